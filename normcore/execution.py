"""The one place that makes and runs onnxruntime sessions: quiet, without spinning threads, with a deadline per run.

Every session owns its thread pool. onnxruntime's process-wide pool (`set_global_thread_pool_sizes`) would be one
budget for all, but from Python nothing stops its threads from spinning: `session.intra_op.allow_spinning` and
`session.force_spinning_stop` are ignored there (measured on 1.31: as much CPU as with spinning, twice that without).
"""

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as state

from normcore.bound_execution import cuda_device, run_bound, to_numpy
from normcore.errors import CheckpointError, DeadlineError, NormcoreError

CPU = ("CPUExecutionProvider",)
Optimization = Literal["none", "basic", "extended", "all"]

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
# The binding's exceptions share no base class of their own; it also lets C++ exceptions through as the last three.
_FAILURES = (
    state.EPFail,
    state.EngineError,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoModel,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
    ValueError,
    MemoryError,
)
_LEVELS: dict[str, onnxruntime.GraphOptimizationLevel] = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FATAL = 4
_MAX_MESSAGE = 300


class ExecutionError(NormcoreError):
    """A graph that failed on these inputs; the message is onnxruntime's, shortened to a sentence."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output: its name, protocol datatype and shape, -1 for a free axis.

    The shape is () for a scalar and also where the graph leaves the rank free: onnxruntime does not tell them apart.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What goes into a session and what comes out of it."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def open_session(
    model: Path | bytes,
    *,
    threads: int,
    optimization: Optimization = "all",
    providers: Sequence[str | tuple[str, dict[str, Any]]] = CPU,
    has_arena: bool = True,
) -> onnxruntime.InferenceSession:
    """Session of an ONNX file or of its bytes, with `threads` compute threads that sleep between runs.

    Args:
        model: path or content of the file.
        threads: threads of one run, the calling one included.
        optimization: how far onnxruntime rewrites the graph; "none" leaves it exactly as it is in the file
            (ORT_DISABLE_ALL): the reference of every proof.
        providers: execution providers in order of preference, with their options.
        has_arena: whether the session keeps the memory of intermediate results on the CPU between runs.

    Raises:
        CheckpointError: onnxruntime cannot load the graph.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = _LEVELS[optimization]
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = has_arena
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=list(providers))
    except _FAILURES as error:
        raise CheckpointError(f"onnxruntime cannot load the graph: {_sentence(error, hidden=source)}") from error
    session.disable_fallback()  # a fallback would print, and run on another device than the one asked for
    return session


def run(
    session: onnxruntime.InferenceSession,
    feeds: Mapping[str, NDArray[Any]],
    output_names: Sequence[str] | None = None,
    *,
    deadline_s: float,
) -> list[NDArray[Any]]:
    """The named outputs, or all, in order; strings come back as object arrays of `str`.

    The arrays may be read-only views of memory that onnxruntime owns. A run is stopped between two operators, also
    inside the body of a Loop: one single operator is not interrupted. onnxruntime's binding cannot take strings in a
    graph that gives bfloat16 out.

    Args:
        session: from `open_session`.
        feeds: arrays by input name; bfloat16 as `ml_dtypes.bfloat16`, strings as object arrays of `bytes` or `str`.
        output_names: None for every output of the graph.
        deadline_s: seconds after which the run is stopped.

    Raises:
        DeadlineError: the run was stopped.
        ExecutionError: the graph failed on these inputs.
    """
    prepared = {name: _to_onnxruntime(name, array) for name, array in feeds.items()}
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL
    try:
        _WATCHDOG.begin(options, deadline_s)
        return _invoke(session, prepared, output_names, options)
    except _FAILURES as error:
        if options.terminate:
            raise DeadlineError("run", deadline_s=deadline_s) from None
        raise ExecutionError(f"the graph failed: {_sentence(error)}") from error
    finally:
        _WATCHDOG.end(options)


def describe(session: onnxruntime.InferenceSession) -> Signature:
    """Inputs and outputs in the words of the inference protocol.

    Raises:
        CheckpointError: an input or output is no tensor of a datatype that the protocol has.
    """
    return Signature(
        inputs=tuple(_tensor_info("input", node) for node in session.get_inputs()),
        outputs=tuple(_tensor_info("output", node) for node in session.get_outputs()),
    )


class _Watchdog:
    """Stops runs at their deadlines with one thread for the whole process, started at the first run.

    A run costs two dictionary operations under a lock: the thread is only woken when the new deadline is earlier than
    the time it already means to look.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deadlines: dict[onnxruntime.RunOptions, float] = {}
        self._next_look = float("inf")
        self._thread: threading.Thread | None = None

    def begin(self, options: onnxruntime.RunOptions, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        with self._changed:
            self._deadlines[options] = deadline
            if self._thread is None or not self._thread.is_alive():  # a forked child has no thread of its parent
                self._thread = threading.Thread(target=self._guard, name="onnxruntime-watchdog", daemon=True)
                self._thread.start()
            if deadline < self._next_look:
                self._changed.notify()

    def end(self, options: onnxruntime.RunOptions) -> None:
        with self._changed:
            self._deadlines.pop(options, None)

    def _guard(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for options, deadline in self._deadlines.items():
                    if deadline <= now:
                        options.terminate = True
                pending = [deadline for deadline in self._deadlines.values() if deadline > now]
                self._next_look = min(pending, default=float("inf"))
                self._changed.wait(min(self._next_look - now, threading.TIMEOUT_MAX))


_WATCHDOG = _Watchdog()


def _invoke(
    session: onnxruntime.InferenceSession,
    feeds: dict[str, Any],
    output_names: Sequence[str] | None,
    options: onnxruntime.RunOptions,
) -> list[NDArray[Any]]:
    device = cuda_device(session.get_providers(), session.get_provider_options())
    if device is not None and not any(isinstance(feed, np.ndarray) and feed.dtype == object for feed in feeds.values()):
        return run_bound(session, feeds, output_names, options, device=("cuda", device))
    if not any(node.type == "tensor(bfloat16)" for node in session.get_outputs()):
        return list(session.run(output_names, feeds, options))
    values = {
        name: feed
        if isinstance(feed, onnxruntime.OrtValue)
        else onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(feed, order="C"))
        for name, feed in feeds.items()
    }
    return [to_numpy(value) for value in session.run_with_ort_values(output_names, values, options)]


def _to_onnxruntime(name: str, array: NDArray[Any]) -> Any:
    kind = array.dtype.kind
    if kind in "fiub":
        return array
    if array.dtype == ml_dtypes.bfloat16:
        bits = np.asarray(array, order="C").view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    if kind in "OS":
        return _decode_strings(name, array)
    return array


def _decode_strings(name: str, array: NDArray[Any]) -> NDArray[Any]:
    decoded = np.empty(array.shape, dtype=object)
    try:
        decoded.reshape(-1)[:] = [
            element.decode() if isinstance(element, bytes) else element for element in array.reshape(-1).tolist()
        ]
    except UnicodeDecodeError as error:
        raise ExecutionError(f"input {name}: onnxruntime takes strings in UTF-8, received {error.reason}") from error
    return decoded


def _tensor_info(role: str, node: onnxruntime.NodeArg) -> TensorInfo:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise CheckpointError(f"{role} {node.name}: {node.type} is no tensor of a datatype of the protocol")
    return TensorInfo(node.name, datatype, tuple(size if isinstance(size, int) else -1 for size in node.shape))


def _sentence(error: BaseException, *, hidden: str | bytes = b"") -> str:
    """The message without onnxruntime's prefix and source lines, and without the path of the file."""
    text = str(error)
    if isinstance(hidden, str):
        text = text.replace(hidden, "the file")
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"\S*/onnxruntime/\S+\s*(\S+\(.*?\)\s)?", "", text)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."


__all__ = ["CPU", "ExecutionError", "Optimization", "Signature", "TensorInfo", "describe", "open_session", "run"]
