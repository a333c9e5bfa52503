"""Machine code on the disk: whatever happens to it, calls are answered, and nothing is taken for what it is not."""

import hashlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normcore import _kept_code
from normcore._compiled import compiled
from normcore._kept_code import KeptCode, compiled_elsewhere, has_all, mark_all

# A kernel that takes a fifth of a second to compile, for as many datatypes as are named.
_PROGRAM = """
import sys
import numpy as np
from normcore import _sweeps
from normcore._kept_code import KeptCode
for dtype in sys.argv[1:]:
    row = np.array([1, 2, 0, 0], dtype)
    _sweeps.repeat(row, 2)
    assert row.tolist() == [1, 2, 1, 2]
print(KeptCode.compiled_here)
"""


def _start(base: Path, *dtypes: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", _PROGRAM, *dtypes]
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(base), **environment}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _compiled_by(process: subprocess.Popen[str]) -> int:
    """How many kernels it compiled."""
    counted, said = process.communicate(timeout=100)
    assert (process.returncode, said) == (0, "")
    return int(counted)


def _files(base: Path) -> list[Path]:
    return sorted(base.glob("kernels-*/repeat-*.code"))


def _truncated(content: bytes) -> bytes:
    return content[:-100]


def _flipped(content: bytes) -> bytes:
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


def _empty(_: bytes) -> bytes:
    return b""


def _foreign(_: bytes) -> bytes:
    """Whole, and no code."""
    content = pickle.dumps(("something", "else"))
    return hashlib.sha256(content).digest() + content


def test_processes_that_compile_one_kernel_at_once_do_not_take_each_other_s_place(tmp_path: Path) -> None:
    dtypes = ["f4", "f8", "i2", "i4"]
    for process in [_start(tmp_path, dtype) for dtype in (*dtypes, "f4")]:
        _compiled_by(process)
    assert len(_files(tmp_path)) == len(dtypes)
    assert _compiled_by(_start(tmp_path, *dtypes)) == 0


def test_another_processor_has_files_of_its_own(tmp_path: Path) -> None:
    other = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert _compiled_by(_start(tmp_path, "f4")) == 1
    assert _compiled_by(_start(tmp_path, "f4", **other)) == 1
    assert len(_files(tmp_path)) == 2
    assert _compiled_by(_start(tmp_path, "f4", **other)) == _compiled_by(_start(tmp_path, "f4")) == 0


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of this process's kernels, with nothing in it; not what other tests use."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(KeptCode, "asked", set())
    _kept_code.folder.cache_clear()
    yield _kept_code.folder() or Path()
    _kept_code.folder.cache_clear()


def _double(row: Any) -> None:
    for index in range(row.size):
        row[index] *= 2


def _doubled() -> list[float]:
    row = np.array([1.0, 2.0])
    compiled(_double)(row)
    return list(row)


@pytest.mark.parametrize("damage", [_truncated, _flipped, _empty, _foreign])
def test_a_damaged_file_is_compiled_again_and_replaced(
    kept: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _doubled()
    (path,) = kept.glob("_double-*.code")
    path.write_bytes(damage(path.read_bytes()))
    before = KeptCode.compiled_here
    for _ in range(2):
        assert _doubled() == [2.0, 4.0]
    assert KeptCode.compiled_here == before + 1
    assert caplog.text.count("is compiled again") == 1


def test_a_folder_that_is_lost_is_made_again(kept: Path) -> None:
    shutil.rmtree(kept)
    assert _doubled() == [2.0, 4.0]
    assert list(kept.glob("_double-*.code"))


def test_what_cannot_be_written_is_a_line_in_the_log(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(kept)
    kept.touch()
    with caplog.at_level(logging.WARNING):
        assert _doubled() == [2.0, 4.0]
    assert "the code of a kernel cannot be kept: " in caplog.text


def test_all_is_what_was_asked_for_and_is_still_there(kept: Path) -> None:
    _doubled()
    assert not has_all(kept)
    assert mark_all(kept)
    assert has_all(kept)
    (path,) = kept.glob("_double-*.code")
    path.unlink()
    assert not has_all(kept)
    assert not mark_all(kept), "what could not be kept is not all"


def test_a_folder_with_all_is_used_where_it_cannot_be_written(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _doubled()
    monkeypatch.setattr(_kept_code, "_is_writable", lambda _: False)
    _kept_code.folder.cache_clear()
    assert _kept_code.folder() is None
    mark_all(kept)
    _kept_code.folder.cache_clear()
    assert _kept_code.folder() == kept
    before = KeptCode.compiled_here
    assert _doubled() == [2.0, 4.0]
    assert KeptCode.compiled_here == before


def test_what_nobody_used_for_a_month_is_removed(kept: Path) -> None:
    now, day = time.time(), 24 * 3600
    young, old, other = (kept.parent / name for name in ("kernels-young", "kernels-old", "something-else"))
    whole, part, old_part = (kept / name for name in ("a.code", "b.part7", "c.part8"))
    for folder in (young, old, other):
        folder.mkdir()
    for path in (whole, part, old_part):
        path.touch()
    os.utime(young, (now, now - 29 * day))
    for path in (kept, old, other, whole):
        os.utime(path, (now, now - 31 * day))
    os.utime(old_part, (now, now - day))
    _kept_code.folder.cache_clear()
    assert _kept_code.folder() == kept
    assert [path.exists() for path in (young, old, other, whole, part, old_part)] == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("has_everything", [False, True])
def test_a_folder_in_use_is_never_old(kept: Path, has_everything: bool) -> None:
    if has_everything:
        mark_all(kept)
    os.utime(kept, (0, 0))
    _kept_code.folder.cache_clear()
    assert _kept_code.folder() == kept
    assert time.time() - kept.stat().st_mtime < 1000


def test_another_process_is_asked_before_this_one_compiles(kept: Path) -> None:
    asked = []

    def elsewhere(module: str, name: str, types: Any) -> bool:
        asked.append((module, name, str(types)))
        return len(asked) > 1  # the second time it says that it did, and did not

    for _ in range(2):
        with compiled_elsewhere(elsewhere):
            assert _doubled() == [2.0, 4.0]
        for path in kept.glob("_double-*.code"):
            path.unlink()
    assert asked == [(__name__, "_double", "(Array(float64, 1, 'C', False, aligned=True),)")] * 2
    assert _doubled() == [2.0, 4.0]
    assert len(asked) == 2


def test_all_kernels_are_compiled_by_a_command_and_found_by_the_next_process(tmp_path: Path) -> None:
    """Uses what this machine has kept, and leaves all kernels there for other tests."""
    command = [sys.executable, "-W", "error", "-m", "normcore.compilation"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    copied = tmp_path / Path(done.stdout.strip()).name
    shutil.copytree(done.stdout.strip(), copied)
    program = (
        "from normcore import compilation, normalization, statistics\n"
        "print(compilation.is_all_kept())\n"
        "normalization.warm_up(), statistics.warm_up()\n"
        "print(compilation.compiled_here())\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for is_whole in (True, False):
        found = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        assert found.stdout.split() == [str(is_whole), str(int(not is_whole))]
        next(copied.glob("are_usual-*.code")).unlink()


def test_several_processes_compile_and_this_one_finds_it(tmp_path: Path) -> None:
    program = (
        "from normcore import compilation\n"
        "if __name__ == '__main__':\n"
        "    compilation._PARTS = compilation._PARTS[-1:]  # the smallest\n"
        "    print(compilation.keep_all(2), compilation.is_all_kept(), compilation.compiled_here())\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "program.py")],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout == "True True 0\n"


def test_without_a_folder_the_command_says_what_to_set() -> None:
    command = [sys.executable, "-m", "normcore.compilation"]
    environment = {**os.environ, "NUMBA_CACHE_DIR": "/proc/nowhere"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (1, "no directory can be written: set NUMBA_CACHE_DIR\n")
