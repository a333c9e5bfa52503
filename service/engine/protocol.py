"""What every engine offers: a spec, an asynchronous infer and a close.

Tensors between codecs, use cases and engines are numpy arrays by name: one representation that holds every
datatype of the protocol (bfloat16 through ml_dtypes, BYTES as object arrays of `bytes`), shares memory with torch
and is what onnxruntime takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from normcore.execution import Optimization

Tensor = NDArray[Any]
Tensors = Mapping[str, Tensor]
ParameterValue = str | bool | int | float | None
Parameters = Mapping[str, ParameterValue]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its name, protocol datatype and shape, -1 for a free axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a client may know of a model. `is_checked_by_engine`: any float datatype and rank, checked by its method."""

    name: str
    version: str
    platform: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_checked_by_engine: bool = False


class InferResult(NamedTuple):
    """Named outputs, what makes them questionable, and nanoseconds in the queue and in the computation.

    A named tuple, as everything that is made for each request: a frozen dataclass takes three times as long.

    Attributes:
        rows: length of the batch axis of this request; 1 where the model has none.
        batch_rows: rows of the execution that computed it, others' included.
        is_first: true for one request of every execution, so that executions can be counted.
    """

    outputs: dict[str, Tensor]
    diagnostics: Mapping[str, Any] = MappingProxyType({})
    queue_ns: int = 0
    compute_ns: int = 0
    rows: int = 1
    batch_rows: int = 1
    is_first: bool = True


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model runs.

    Attributes:
        max_batch_size: rows that requests are joined up to; 0 runs every request alone.
        max_queue_delay_us: microseconds that a request may wait for others to join it.
        instances: executions at a time; they share one session and divide the threads.
        device: auto, cpu or cuda:N.
        optimization: how far onnxruntime rewrites the graph.
        warmup: shapes by input name, each run once before the model is ready.
        is_cost_known: found at the first load: what a run takes follows from its input shapes.
        latest_versions: how many of a model's versions, the highest, a load serves; 0 is all of them.
        specific_versions: the versions that a load serves; empty leaves it to `latest_versions`.
    """

    max_batch_size: int = 0
    max_queue_delay_us: int = 0
    instances: int = 1
    device: str = "auto"
    optimization: Optimization = "all"
    warmup: tuple[Mapping[str, Sequence[int]], ...] = ()
    is_cost_known: bool = False
    latest_versions: int = 0
    specific_versions: Sequence[int] = ()


class Engine(Protocol):
    """A loaded model."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        ...

    async def infer(
        self,
        inputs: Tensors,
        *,
        outputs: Sequence[str] | None = None,
        parameters: Parameters | None = None,
        deadline_s: float,
        is_alone: bool = False,
    ) -> InferResult:
        """Compute the named outputs, or all; `is_alone`: in no batch with other requests.

        Raises OverloadedError, DeadlineExceededError or a NormcoreError.
        """
        ...

    def infer_now(
        self, requests: Sequence[tuple[Tensors, Sequence[str] | None]], *, deadline_s: float
    ) -> list[InferResult | None]:
        """Compute at once, in the event loop, what is known to take far less than a millisecond.

        Inputs and named outputs of requests without parameters; None for each that is left to `infer`: nothing was
        computed for it, or its computation failed.
        """
        ...

    async def drain(self) -> None:
        """Return when every call made so far has ended."""
        ...

    async def close(self) -> None:
        """Finish what runs, refuse what waits, free the memory. Calling it again does nothing."""
        ...


__all__ = [
    "Engine",
    "InferResult",
    "ModelOptions",
    "ModelSpec",
    "ParameterValue",
    "Parameters",
    "Tensor",
    "TensorSpec",
    "Tensors",
]
