"""What every framework serves: the input `x` and the output `y` of one onnxruntime session."""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Rows = NDArray[np.float32]


class Network:
    """Threads that sleep between runs, as the service's own do."""

    def __init__(self, model: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Without the batch axis."""
        return tuple(self._session.get_inputs()[0].shape[1:])

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(self._session.get_outputs()[0].shape[1:])

    def __call__(self, x: Rows) -> Rows:
        found: list[Any] = self._session.run(None, {"x": x})
        rows: Rows = found[0]
        return rows


@dataclass(frozen=True, slots=True)
class Arguments:
    """How to serve. `rows`: how many are joined into one run where that means to wait for them; 1 joins none."""

    model: str
    port: int
    threads: int
    rows: int


def read_arguments() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("port", "threads", "rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return Arguments(**vars(parser.parse_args()))
