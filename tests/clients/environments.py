"""Environments of other people's clients: made once, with pins of their own, in a cache."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.wheels import CACHE

_REQUIREMENTS = Path(__file__).parent / "requirements"


def environment(name: str) -> Path:
    """The folder of the virtual environment with the packages of `requirements/<name>.txt`."""
    requirements = _REQUIREMENTS / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = CACHE.parent / "clients" / f"{name}-{digest}"
    if not folder.exists():
        # A virtual environment cannot be moved, so it says itself when it is whole.
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(partial)], check=True, timeout=120)
        command = [sys.executable, "-m", "pip", "--python", str(partial / "bin" / "python"), "install"]
        # All that is needed is pinned, and most of it never imported.
        command += ["-q", "--no-deps", "--no-compile", "--disable-pip-version-check", "-r", str(requirements)]
        subprocess.run(command, check=True, timeout=600)
        partial.rename(folder)
    return folder
