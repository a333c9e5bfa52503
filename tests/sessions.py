"""One shell and one Python for the commands of a documentation page, as a reader would keep them open."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TIMEOUT_S = 120
_END = b"\0"
# A block is one JSON text on a line; the marker says that it ended well, the end of the stream that it did not.
_PYTHON = """
import json, sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    exec(compile(json.loads(line), "<page>", "exec"), names)
    print(end=chr(0), flush=True)
"""


@dataclass(frozen=True)
class Session:
    """An interpreter that runs blocks one after the other; variables of one block are there in the next."""

    process: subprocess.Popen[bytes]
    errors: Path
    is_shell: bool

    def run(self, block: str) -> str:
        """What the block printed. An AssertionError carries what it said instead of ending well."""
        watchdog = threading.Timer(_TIMEOUT_S, self.process.kill)
        watchdog.start()
        try:
            _pipe(self.process.stdin).write(_in_shell(block) if self.is_shell else json.dumps(block).encode() + b"\n")
            _pipe(self.process.stdin).flush()
            found = bytearray()
            while (byte := _pipe(self.process.stdout).read(1)) != _END:
                assert byte, f"{block}\nended with\n{found.decode()}{self.errors.read_text()}"
                found += byte
        finally:
            watchdog.cancel()
        return found.decode()


@contextmanager
def session(folder: Path, *, language: str, environment: dict[str, str]) -> Iterator[Session]:
    """A session in a folder, `sh` or `python`, with the package importable and its interpreter first on the path."""
    root = Path(__file__).parent.parent
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    errors = folder.with_name(f"{folder.name}.{language}.log")
    command = ["bash", "-euo", "pipefail"] if language == "sh" else [sys.executable, "-c", _PYTHON]
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | path | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    with process:
        yield Session(process, errors, is_shell=language == "sh")
        process.kill()


def run_in_shell(lines: str, folder: Path, **variables: str) -> bytes:
    """What lines print in a shell of their own, where curl fails when the answer is an error."""
    (folder / ".curlrc").write_text("fail-with-body\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CURL_HOME": str(folder)} | variables
    done = subprocess.run(["sh", "-ec", lines], cwd=folder, env=environment, capture_output=True, timeout=_TIMEOUT_S)
    assert done.returncode == 0, (lines[:500], done.stdout[:500], done.stderr)
    assert done.stderr == b""
    return done.stdout


def _in_shell(block: str) -> bytes:
    """No command of the block may read the blocks after it."""
    return f"{{\n{block}\n}} </dev/null\nprintf '\\0'\n".encode()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
