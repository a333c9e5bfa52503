"""Servers in processes of their own, for as long as a block runs."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.load import Call

_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A process that listens."""

    port: int
    pid: int

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Any:
        """The JSON of an answer. Raises RuntimeError where it is an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:300]!r}")
        return json.loads(content) if content else None

    def serve(self, name: str, model: bytes, **options: object) -> str:
        """Upload a model and serve it; its path for inference."""
        checkpoint = self.ask("POST", "/v1/checkpoints", model)["id"]
        document = {"name": name, "checkpoint": checkpoint, "fold": False, **options}
        return str(self.ask("POST", "/v1/models", json.dumps(document).encode())["infer"])

    def memory_bytes(self, field: str = "VmRSS") -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(field)

    def cpu_s(self) -> float:
        """Seconds that the process and those it started have computed."""
        ticks = 0
        for pid in _family(self.pid):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def forget_peak(self) -> None:
        """Let VmHWM count from now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextmanager
def service(**settings: object) -> Iterator[Server]:
    """`python -m service` on a free port with a fresh data folder."""
    with tempfile.TemporaryDirectory() as folder:
        named = {f"NORMSERVE_{name.upper()}": str(value) for name, value in settings.items()}
        fixed = {"NORMSERVE_PORT": "0", "NORMSERVE_DATA_DIR": folder, "NORMSERVE_DRAIN_S": "0"}
        with _announced(["-m", "service"], fixed | named) as (line, pid):
            yield Server(int(line.partition("http://127.0.0.1:")[2].partition(",")[0]), pid)


@contextmanager
def peer(kind: str, model: Path | None = None, *, threads: int = 1) -> Iterator[Server]:
    """A server of benchmarks/peers.py."""
    arguments = ["--model", str(model), "--threads", str(threads)] if model is not None else []
    with _announced(["-m", "benchmarks.peers", kind, *arguments], {}) as (line, pid):
        yield Server(int(line), pid)


@contextmanager
def spawned(command: list[str], *, ready: str) -> Iterator[Server]:
    """A server that takes its port as an option, once it answers 200 at the path `ready`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with _process([*command, "--port", str(port)], {}, is_heard=False) as (process, log):
        server, patient_until = Server(port, process.pid), time.monotonic() + _PATIENCE_S
        while not _is_ready(server, ready):
            if process.poll() is not None or time.monotonic() > patient_until:
                raise RuntimeError(f"{command}: {_end_of(log)}")
            time.sleep(0.1)
        yield server


def _is_ready(server: Server, path: str) -> bool:
    try:
        server.ask("GET", path)
    except json.JSONDecodeError:
        return True  # an answer in other words
    except (RuntimeError, OSError):
        return False
    return True


@contextmanager
def _announced(arguments: list[str], settings: dict[str, str]) -> Iterator[tuple[str, int]]:
    """A program of this interpreter that says in its first line where it listens."""
    with _process([sys.executable, *arguments], settings, is_heard=True) as (process, log):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{arguments}: {_end_of(log)}")
        yield line, process.pid


@contextmanager
def _process(
    command: list[str], settings: dict[str, str], *, is_heard: bool
) -> Iterator[tuple[subprocess.Popen[str], IO[bytes]]]:
    """A process and its log, which has what it says too unless that `is_heard`; it ends with all that it started."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            env=os.environ | settings,
            stdout=subprocess.PIPE if is_heard else log,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield process, log
        finally:
            started = _family(process.pid)[1:]
            process.terminate()
            process.wait()
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    """The process, those that it started, and those that they did."""
    found = [pid]
    with contextlib.suppress(OSError):  # it has ended meanwhile
        children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        found += [member for words in children for child in words for member in _family(int(child))]
    return found


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-2000:].decode()


def binary_call(port: int, path: str, name: str, tensor: np.ndarray[Any, Any], **parameters: object) -> Call:
    """An inference with one FP32 tensor in, and every output out, behind the JSON."""
    entry = {
        "name": name,
        "shape": tensor.shape,
        "datatype": "FP32",
        "parameters": {"binary_data_size": tensor.nbytes},
    }
    document = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True, **parameters}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(document))}
    return Call(port, path, document + tensor.tobytes(), headers)
