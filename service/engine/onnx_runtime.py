"""An ONNX model on onnxruntime, in a worker thread of its own."""

import asyncio
import ctypes
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from normcore.errors import DeadlineError
from normcore.execution import TensorInfo, describe, open_session, run
from service.engine.protocol import InferResult, ModelSpec, Parameters, Tensor, Tensors, TensorSpec
from service.engine.worker import Worker
from service.errors import DeadlineExceededError, ModelNotReadyError

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"


class OnnxEngine:
    """Implements Engine. Make it with `load`."""

    def __init__(self, session: onnxruntime.InferenceSession, spec: ModelSpec, worker: Worker) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._spec = spec
        self._worker = worker

    @classmethod
    async def load(
        cls, path: Path, *, name: str, version: str, threads: int, queue_size: int, deadline_s: float
    ) -> "OnnxEngine":
        """Open the session in the engine's worker thread.

        Raises:
            CheckpointError: onnxruntime cannot load the file.
            DeadlineExceededError: it does not load within `deadline_s`.
        """
        worker = Worker(f"model {name} version {version}", queue_size)
        try:
            opened, _, _ = await worker.submit(
                lambda: _open(path, name=name, version=version, threads=threads), deadline_s=deadline_s
            )
        except BaseException:
            worker.stop()
            raise
        return cls(*opened, worker)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    async def infer(
        self,
        inputs: Tensors,
        *,
        outputs: Sequence[str] | None = None,
        parameters: Parameters | None = None,
        deadline_s: float,
    ) -> InferResult:
        """See Engine. The time in the queue counts; a run is stopped between two operators of the graph.

        A graph takes no parameters. BYTES must be UTF-8, which is all that onnxruntime's strings hold.
        """
        session = self._session
        if session is None:
            raise ModelNotReadyError(f"{self._worker.name} is unloaded")
        names = [spec.name for spec in self._spec.outputs] if outputs is None else list(outputs)
        until = time.monotonic() + deadline_s

        def compute() -> dict[str, Tensor]:
            arrays = run(session, inputs, names, deadline_s=max(0.0, until - time.monotonic()))
            return {name: _encoded(array) for name, array in zip(names, arrays, strict=True)}

        try:
            computed, queue_ns, compute_ns = await self._worker.submit(compute, deadline_s=deadline_s)
        except DeadlineError:
            raise DeadlineExceededError(
                f"{self._worker.name}: stopped at its deadline of {deadline_s:g} s", deadline_s=deadline_s
            ) from None
        return InferResult(computed, queue_ns=queue_ns, compute_ns=compute_ns)

    async def drain(self) -> None:
        """See Engine."""
        await self._worker.drain()

    async def close(self) -> None:
        """See Engine. Freed memory goes back to the system: the allocator would keep it for this process."""
        await self._worker.close()
        if self._session is not None:
            self._session = None
            await asyncio.to_thread(_release_memory)


def _open(path: Path, *, name: str, version: str, threads: int) -> tuple[onnxruntime.InferenceSession, ModelSpec]:
    session = open_session(path, threads=threads)
    signature = describe(session)
    return session, ModelSpec(
        name=name,
        version=version,
        platform=PLATFORM,
        backend=BACKEND,
        inputs=tuple(_tensor_spec(info) for info in signature.inputs),
        outputs=tuple(_tensor_spec(info) for info in signature.outputs),
        # onnxruntime tells a free rank like a scalar's, and checks either itself
        is_checked_by_engine=any(not info.shape for info in signature.inputs),
    )


def _tensor_spec(info: TensorInfo) -> TensorSpec:
    return TensorSpec(info.name, info.datatype, info.shape or ())


def _encoded(array: Tensor) -> Tensor:
    """Strings of onnxruntime as the protocol's BYTES."""
    if array.dtype.kind != "O":
        return array
    encoded = np.empty(array.shape, dtype=object)
    encoded.reshape(-1)[:] = [element.encode() for element in array.reshape(-1).tolist()]
    return encoded


def _release_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
