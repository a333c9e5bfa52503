"""An ONNX model on onnxruntime, in a worker thread of its own."""

import asyncio
import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

from normcore.errors import CheckpointError, DeadlineError, NormcoreError, ParameterError, ShapeError
from normcore.execution import TensorInfo, describe, open_session, run
from service.datatypes import BYTES, Datatype, by_name
from service.engine.batch import Batching, Part, Ran
from service.engine.devices import Providers, providers_for
from service.engine.protocol import InferResult, ModelOptions, ModelSpec, Parameters, Tensor, Tensors, TensorSpec
from service.engine.worker import Worker
from service.errors import DeadlineExceededError, ModelNotReadyError

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"


class OnnxEngine:
    """Implements Engine. Make it with `load`."""

    def __init__(
        self, name: str, *, queue_size: int, max_batch_bytes: int, providers: Providers, options: ModelOptions
    ) -> None:
        self._session: onnxruntime.InferenceSession | None = None
        self._spec: ModelSpec | None = None
        self._output_names: tuple[str, ...] = ()
        batching = None
        if options.max_batch_size:
            batching = Batching(
                max_rows=options.max_batch_size,
                max_bytes=max_batch_bytes,
                max_delay_s=options.max_queue_delay_us / 1e6,
                is_cost_known=options.is_cost_known and providers == providers_for("cpu"),
                run=self._compute_together,
            )
        self._worker = Worker(name, queue_size, threads=options.instances, batching=batching)
        self.options = options

    @classmethod
    async def load(
        cls,
        path: Path,
        *,
        name: str,
        version: str,
        threads: int,
        queue_size: int,
        deadline_s: float,
        max_batch_bytes: int,
        has_arena: bool,
        options: ModelOptions,
    ) -> "OnnxEngine":
        """Open the session in one of the engine's worker threads, and run the warm-up shapes there.

        Raises:
            CheckpointError: onnxruntime cannot load the file, or a warm-up fails.
            ParameterError: an option does not fit the model or this host.
            DeadlineExceededError: all this takes longer than `deadline_s`.
        """
        title = f"model {name} version {version}"
        providers = await asyncio.to_thread(providers_for, options.device)
        engine = cls(
            title, queue_size=queue_size, max_batch_bytes=max_batch_bytes, providers=providers, options=options
        )
        until = time.monotonic() + deadline_s

        def start() -> None:
            engine._session, engine._spec = _open(
                path,
                name=name,
                version=version,
                threads=threads,
                providers=providers,
                has_arena=has_arena,
                options=options,
            )
            engine._output_names = tuple([tensor.name for tensor in engine._spec.outputs])
            for shapes in options.warmup:
                engine._warm_up(shapes, deadline_s=max(0.0, until - time.monotonic()))

        try:
            await engine._worker.submit(start, deadline_s=deadline_s)
        except BaseException:
            engine._worker.stop()
            raise
        return engine

    @property
    def spec(self) -> ModelSpec:
        assert self._spec is not None
        return self._spec

    @property
    def waiting(self) -> int:
        """See Engine."""
        return self._worker.waiting

    async def infer(
        self,
        inputs: Tensors,
        *,
        outputs: Sequence[str] | None = None,
        parameters: Parameters | None = None,
        deadline_s: float,
        is_alone: bool = False,
    ) -> InferResult:
        """See Engine. The time in the queue counts; a run is stopped between two operators of the graph.

        A graph takes no parameters. BYTES must be UTF-8, which is all that onnxruntime's strings hold.
        """
        if self._session is None:
            raise ModelNotReadyError(f"{self._worker.name} is unloaded")
        names = self._output_names if outputs is None else tuple(outputs)
        until = time.monotonic() + deadline_s
        joined = _part(inputs, names) if self.options.max_batch_size else None
        part = None if is_alone else joined

        def compute() -> dict[str, Tensor]:
            return self._compute(inputs, names, max(0.0, until - time.monotonic()))

        try:
            ran = await self._worker.submit(compute, deadline_s=deadline_s, part=part)
        except DeadlineError:
            raise DeadlineExceededError(
                f"{self._worker.name}: stopped at its deadline of {deadline_s:g} s", deadline_s=deadline_s
            ) from None
        rows = 1 if joined is None else joined.rows
        return _result(ran, rows, rows if part is None else ran.batch_rows)

    def infer_now(
        self, requests: Sequence[tuple[Tensors, Sequence[str] | None]], *, deadline_s: float
    ) -> list[InferResult | None]:
        """See Engine."""
        if self._session is None or not self.options.max_batch_size:
            return [None] * len(requests)
        calls: list[tuple[Callable[[], dict[str, Tensor]], Part | None]] = []
        for inputs, outputs in requests:
            names = self._output_names if outputs is None else tuple(outputs)
            calls.append((partial(self._compute, inputs, names, deadline_s), _part(inputs, names)))
        return [
            None if ran is None or part is None else _result(ran, part.rows, ran.batch_rows)
            for ran, (_, part) in zip(self._worker.run_now(calls, deadline_s=deadline_s), calls, strict=True)
        ]

    async def drain(self) -> None:
        """See Engine."""
        await self._worker.drain()

    async def close(self) -> None:
        """See Engine. Freed memory goes back to the system: the allocator would keep it for this process."""
        await self._worker.close()
        if self._session is not None:
            self._session = None
            await asyncio.to_thread(_release_memory)

    def _warm_up(self, shapes: Mapping[str, Sequence[int]], *, deadline_s: float) -> None:
        known = {tensor.name: tensor for tensor in self.spec.inputs}
        if set(shapes) != set(known):
            expected = f"a shape for each of {', '.join(known)}"
            raise ParameterError("warmup", expected=expected, received=", ".join(sorted(shapes)) or "none")
        feeds = {name: _zeros(by_name(known[name].datatype), shape) for name, shape in shapes.items()}
        try:
            self._compute(feeds, self._output_names, deadline_s)
        except NormcoreError as error:
            raise CheckpointError(f"warmup of shapes {dict(shapes)}: {error}") from error

    def _compute(self, inputs: Tensors, names: Sequence[str], deadline_s: float) -> dict[str, Tensor]:
        if self._session is None:
            raise ModelNotReadyError(f"{self._worker.name} is unloaded")
        arrays = run(self._session, inputs, names, deadline_s=deadline_s)
        return {name: _encoded(array) for name, array in zip(names, arrays, strict=True)}

    def _compute_together(self, requests: Sequence["_Request"], deadline_s: float) -> list[dict[str, Tensor]]:
        """One run for requests of one group; each gets its rows of every output, as views."""
        joined = {name: np.concatenate([request.inputs[name] for request in requests]) for name in requests[0].inputs}
        outputs = self._compute(joined, requests[0].outputs, deadline_s)
        *starts, rows = accumulate([request.rows for request in requests], initial=0)
        for name, array in outputs.items():
            if array.ndim == 0 or array.shape[0] != rows:
                raise ShapeError(name, expected=f"{rows} rows", received=f"shape {array.shape}")
        return [
            {name: array[start : start + request.rows] for name, array in outputs.items()}
            for start, request in zip(starts, requests, strict=True)
        ]


class _Request(NamedTuple):
    """What a batch needs to know of a request."""

    inputs: Tensors
    outputs: tuple[str, ...]
    rows: int


def _result(ran: Ran[dict[str, Tensor]], rows: int, batch_rows: int) -> InferResult:
    return InferResult(
        ran.result,
        queue_ns=ran.queue_ns,
        compute_ns=ran.compute_ns,
        rows=rows,
        batch_rows=batch_rows,
        is_first=ran.is_first,
    )


def _zeros(datatype: Datatype, shape: Sequence[int]) -> Tensor:
    return np.full(tuple(shape), b"", object) if datatype is BYTES else np.zeros(tuple(shape), datatype.numpy)


def _part(inputs: Tensors, outputs: tuple[str, ...]) -> Part | None:
    """Requests with the same inputs, datatypes, trailing shapes and outputs are of one group.

    None where the first axes of the inputs do not share their length, or it is 0.
    """
    rows, size_bytes, trailing = -1, 0, []
    for name, array in inputs.items():
        shape = array.shape
        length = shape[0] if shape else 0
        if rows not in (-1, length):
            return None
        rows = length
        size_bytes += array.nbytes
        trailing.append((name, array.dtype, shape[1:]))
    return Part((tuple(trailing), outputs), rows, size_bytes, _Request(inputs, outputs, rows)) if rows > 0 else None


def _check_batch_axis(spec: ModelSpec) -> None:
    for tensor in (*spec.inputs, *spec.outputs):
        if not tensor.shape or tensor.shape[0] != -1:
            raise ParameterError(
                "max_batch_size",
                expected="0 for a model that has an input or output without a free first axis",
                received=f"{tensor.name!r} of shape {list(tensor.shape)}",
            )


def _open(
    path: Path,
    *,
    name: str,
    version: str,
    threads: int,
    providers: Providers,
    has_arena: bool,
    options: ModelOptions,
) -> tuple[onnxruntime.InferenceSession, ModelSpec]:
    session = open_session(
        path,
        threads=max(1, threads // options.instances),
        optimization=options.optimization,
        providers=providers,
        has_arena=has_arena,
    )
    signature = describe(session)
    spec = ModelSpec(
        name=name,
        version=version,
        platform=PLATFORM,
        backend=BACKEND,
        inputs=tuple(_tensor_spec(info) for info in signature.inputs),
        outputs=tuple(_tensor_spec(info) for info in signature.outputs),
        # onnxruntime tells a free rank like a scalar's, and checks either itself
        is_checked_by_engine=any(not info.shape for info in signature.inputs),
    )
    if options.max_batch_size:
        _check_batch_axis(spec)
    return session, spec


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
