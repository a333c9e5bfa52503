"""The README is true: its commands are run as they stand, its answers are compared, its settings are all there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.server import running

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(sh|python)\n(.*?)```\n(?:```(json|text)\n(.*?)```)?", re.DOTALL)


def test_readme_commands_give_what_it_shows(tmp_path: Path, ocr_cls: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "cls.onnx").write_bytes(ocr_cls.read_bytes())
    blocks = BLOCK.findall(README)
    assert len(blocks) == 4
    with running(tmp_path / "data") as server:
        for language, command, kind, shown in blocks:
            interpreter = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            done = subprocess.run(
                [*interpreter, command.replace("127.0.0.1:8000", server.address)],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            if kind == "json":
                assert_close(json.loads(done.stdout), json.loads(shown))
            else:
                assert done.stdout.replace("\r", "").split() == shown.split()


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    expected = {
        f"NORMSERVE_{name.upper()}": (shown_default(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert settings_in((ROOT / "docs" / "settings.md").read_text()) == expected
    shown = settings_in(README)
    assert shown
    assert shown.items() <= expected.items()


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150


def settings_in(text: str) -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `(NORMSERVE_\w+)` \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in rows}


def assert_close(found: Any, shown: Any) -> None:
    """The same document, numbers within single precision."""
    if isinstance(shown, dict):
        assert found.keys() == shown.keys()
        for key, value in shown.items():
            assert_close(found[key], value)
    elif isinstance(shown, list):
        assert len(found) == len(shown)
        for left, right in zip(found, shown, strict=True):
            assert_close(left, right)
    else:
        assert found == (pytest.approx(shown, rel=1e-6) if isinstance(shown, float) else shown)


def shown_default(value: object) -> str:
    return "" if value in (None, "", ()) else f"`{value}`"
