"""Logs: one JSON object a line, with the request it belongs to."""

import json
import logging

import pytest

from service.telemetry import JsonFormatter, configure_logging, request_id


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("service.test", logging.WARNING, __file__, 1, message, None, None)
    vars(made).update(extra)
    return made


def test_a_record_is_one_line_of_json() -> None:
    line = JsonFormatter().format(record("two\nlines", model="m", ms=1.5, color_message="\x1b[36m"))
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z")
    assert entry == {"level": "warning", "logger": "service.test", "message": "two\nlines", "model": "m", "ms": 1.5}


def test_a_record_inside_a_request_carries_its_id() -> None:
    token = request_id.set("abc")
    try:
        assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "abc"
    finally:
        request_id.reset(token)


def test_an_exception_brings_its_trace() -> None:
    made = record("failed")
    try:
        raise RuntimeError("inside")
    except RuntimeError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    assert "RuntimeError: inside" in json.loads(JsonFormatter().format(made))["trace"]


def test_configured_logging_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        configure_logging("warning")
        logging.getLogger("anything").info("too quiet")
        logging.getLogger("anything").error("heard")
        assert json.loads(capsys.readouterr().err)["message"] == "heard"
    finally:
        root.handlers[:], root.level = before, level
