"""Settings: read from the environment once, checked, immutable."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


def test_the_environment_is_read_with_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMSERVE_PORT", "9000")
    monkeypatch.setenv("NORMSERVE_DATA_DIR", "/somewhere")
    monkeypatch.setenv("NORMSERVE_ALLOWED_HOSTS", "a.example, b.example,")
    monkeypatch.setenv("PORT", "1")
    settings = Settings()
    assert (settings.port, settings.data_dir) == (9000, Path("/somewhere"))
    assert settings.allowed_hosts == ("a.example", "b.example")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]  # what the test is about


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70_000), ("queue_size", 0), ("body_timeout_s", -1), ("log_level", "loud"), ("unknown", 1)],
)
def test_values_out_of_bounds_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]  # what the test is about


def test_a_wrong_setting_stops_the_start_with_its_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        env={"NORMSERVE_PORT": "many", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "NORMSERVE_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in Settings.model_fields.values())
