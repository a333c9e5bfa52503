"""The frameworks of benchmarks/frameworks that this machine has, and how each is asked for one row.

One is here where this interpreter has it, or where LITSERVE_PYTHON, MLSERVER_PYTHON or PYTRITON_PYTHON names another
that does: none of them goes with what this project pins. `pip install litserve onnxruntime` in an environment of its
own is all, and so on; PyTriton wants the system's own interpreter.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import Call
from benchmarks.servers import Server, binary_call, spawned

Rows = NDArray[np.float32]

_INFER = "/v2/models/served/infer"
_READY = "/v2/models/served/ready"
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Rival:
    """A framework by the name of its package; `ask` makes the request for one row in the fastest form it takes."""

    package: str
    title: str
    ready: str
    ask: Callable[[int, Rows], Call]

    @property
    def interpreter(self) -> str | None:
        """The one that has it; None where there is none."""
        here = sys.executable if importlib.util.find_spec(self.package) else None
        return os.environ.get(f"{self.package.upper()}_PYTHON", here)

    @contextmanager
    def serving(self, model: Path, *, threads: int, rows: int) -> Iterator[Server]:
        """It serves the model; to join up to `rows` rows it may wait for a millisecond."""
        interpreter = self.interpreter
        assert interpreter is not None
        program = [interpreter, "-m", f"benchmarks.frameworks.{self.package}", str(model)]
        with spawned([*program, "--threads", str(threads), "--rows", str(rows)], ready=self.ready) as server:
            yield server


def _plain_json(port: int, row: Rows) -> Call:
    return Call(port, "/predict", json.dumps({"x": row[0].tolist()}).encode(), _JSON)


def _protocol_json(port: int, row: Rows) -> Call:
    entry = {"name": "x", "shape": row.shape, "datatype": "FP32", "data": row.reshape(-1).tolist()}
    return Call(port, _INFER, json.dumps({"inputs": [entry]}).encode(), _JSON)


def _protocol_binary(port: int, row: Rows) -> Call:
    return binary_call(port, _INFER, "x", row)


RIVALS = (
    Rival("pytriton", "Triton, binary", _READY, _protocol_binary),
    Rival("mlserver", "MLServer, JSON", _READY, _protocol_json),
    Rival("litserve", "LitServe, JSON", "/health", _plain_json),
)
