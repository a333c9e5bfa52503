"""The documentation is true: its commands are run as they stand, its answers are compared, its settings are all there.

A block ```sh or ```python is run; a block ```text or ```json right behind it is what it prints, where ... stands for
anything. Without one it prints nothing. The blocks of a page are one session. All pages share one service.
"""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.server import Server
from tests.sessions import Session, session

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n(?:```(json|text)\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
ANYTHING = "..."
# A page that loses its blocks would pass without being run.
LEAST_BLOCKS = {
    "README": 4,
    "compute": 14,
    "statistics": 11,
    "folding": 10,
    "serving": 7,
    "conventions": 2,
    "operations": 3,
    "CONTRIBUTING": 1,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_give_what_the_page_shows(
    page: Path, tmp_path: Path, server: Server, data_dir: Path, ocr_cls: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "cls.onnx").write_bytes(ocr_cls.read_bytes())
    blocks = BLOCK.findall(page.read_text())
    assert len(blocks) >= LEAST_BLOCKS.get(page.stem, 0)
    sessions: dict[str, Session] = {}
    with ExitStack() as stack:
        for language, command, kind, shown in blocks:
            if language not in sessions:
                environment = {"NORMSERVE_DATA_DIR": str(data_dir), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
                opened = session(work, language=language, environment=environment)
                sessions[language] = stack.enter_context(opened)
            printed = sessions[language].run(command.replace("127.0.0.1:8000", server.address))
            if kind == "json":
                assert_close(json.loads(printed), json.loads(shown))
            else:
                assert_like(printed, shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        assert (page.parent / target).exists(), target


def test_files_that_the_map_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([\w./*]+(?:\.py|/))`", text[text.index("## Which file") : text.index("## Rules")]))
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("[a-z]*/**/*.py")}
    folders = {path.rpartition("/")[0] for path in files}
    for name in named:
        pattern = f"(.*/)?{re.escape(name.rstrip('/')).replace(re.escape('*'), '[a-z_]*')}"
        assert any(re.fullmatch(pattern, path) for path in (files | folders)), name


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    expected = {
        f"NORMSERVE_{name.upper()}": (shown_default(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert settings_in((ROOT / "docs" / "settings.md").read_text()) == expected
    shown = settings_in(README.read_text())
    assert shown
    assert shown.items() <= expected.items()


def test_settings_that_pages_name_exist() -> None:
    known = {f"NORMSERVE_{name.upper()}" for name in Settings.model_fields}
    elsewhere = {"NORMSERVE_PUBLISH", "NORMSERVE_MEMORY", "NORMSERVE_TEST_CACHE"}  # of compose and of the tests
    for page in PAGES:
        assert set(re.findall(r"NORMSERVE_[A-Z_]+[A-Z]", page.read_text())) <= known | elsewhere, page.name


def test_the_readme_is_short() -> None:
    assert README.read_text().count("\n") <= 150


def settings_in(text: str) -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `(NORMSERVE_\w+)` \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in rows}


def assert_like(printed: str, shown: str) -> None:
    """The same words; white space is free."""
    words = " ".join(shown.split())
    pattern = ".*".join(re.escape(part) for part in words.split(ANYTHING))
    found = " ".join(printed.split())
    assert re.fullmatch(pattern, found), f"expected\n{words}\nreceived\n{found}"


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
    elif shown != ANYTHING:
        assert found == (pytest.approx(shown, rel=1e-6) if isinstance(shown, float) else shown)


def shown_default(value: object) -> str:
    return "" if value in (None, "", ()) else f"`{value}`"
