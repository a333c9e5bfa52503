"""Servers in processes of their own, for as long as a block runs."""

import http.client
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Call


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
        """Seconds that the process's threads have computed."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def forget_peak(self) -> None:
        """Let VmHWM count from now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextmanager
def service(**settings: object) -> Iterator[Server]:
    """`python -m service` on a free port with a fresh data folder."""
    with tempfile.TemporaryDirectory() as folder:
        named = {f"NORMSERVE_{name.upper()}": str(value) for name, value in settings.items()}
        fixed = {"NORMSERVE_PORT": "0", "NORMSERVE_DATA_DIR": folder, "NORMSERVE_DRAIN_S": "0"}
        with _process(["-m", "service"], fixed | named) as (line, pid):
            yield Server(int(line.partition("http://127.0.0.1:")[2].partition(",")[0]), pid)


@contextmanager
def peer(kind: str, model: Path | None = None, *, threads: int = 1) -> Iterator[Server]:
    """A server of benchmarks/peers.py."""
    arguments = ["--model", str(model), "--threads", str(threads)] if model is not None else []
    with _process(["-m", "benchmarks.peers", kind, *arguments], {}) as (line, pid):
        yield Server(int(line), pid)


@contextmanager
def _process(arguments: list[str], settings: dict[str, str]) -> Iterator[tuple[str, int]]:
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise RuntimeError(f"{arguments}: {log.read()[-2000:].decode()}")
            yield line, process.pid
        finally:
            process.terminate()


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
