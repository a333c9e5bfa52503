"""The real service as a process on a free port, for tests that drive it as a user does."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Server:
    """A running service: its process, its address as `host:port`, and the file with its log."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextmanager
def running(data_dir: Path, settings: Mapping[str, str] | None = None, *, patience_s: float = 60) -> Iterator[Server]:
    """Start `python -m service` and wait until it is ready; stopped at the end if it still runs."""
    log = data_dir.with_suffix(".log")
    environment = {
        **os.environ,
        "NORMSERVE_PORT": "0",
        "NORMSERVE_DATA_DIR": str(data_dir),
        "NORMSERVE_DRAIN_S": "0.2",
        "NORMSERVE_COMPILE_S": "0",
        **(settings or {}),
    }
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://(\S+),", line)
        assert found, f"the service said {line!r}; its log: {log.read_text()}"
        server = Server(process, found[1], log)
        _wait_until_ready(server, patience_s)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def _wait_until_ready(server: Server, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while httpx.get(f"{server.url}/v2/health/ready").status_code != 200:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)
