"""Settings: read from the environment once, checked, immutable."""

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
    [
        ("port", 70_000),
        ("queue_size", 0),
        ("body_timeout_s", -1),
        ("log_level", "loud"),
        ("unknown", 1),
        ("infer_deadline_s", float("inf")),
        ("otlp_endpoint", "collector:4318"),
    ],
)
def test_values_out_of_bounds_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]  # what the test is about


def test_an_empty_variable_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMSERVE_PORT", "")
    monkeypatch.setenv("NORMSERVE_DATA_DIR", "")
    assert (Settings().port, Settings().data_dir) == (8000, Path("data"))


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in Settings.model_fields.values())
