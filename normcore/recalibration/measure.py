"""The moments of tensors inside a network, pooled over batches of data."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, ValueInfoProto

from normcore import execution
from normcore.errors import DeadlineError, ShapeError, StatisticsError
from normcore.folding.onnx.batch_norm import CHANNEL_AXIS
from normcore.folding.onnx.names import used_names
from normcore.recalibration.batches import Batch
from normcore.recalibration.layers import Layer
from normcore.statistics import Moments


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Threads of onnxruntime, and when the work must be over, by time.monotonic()."""

    threads: int
    deadline: float
    deadline_s: float

    @classmethod
    def of(cls, *, threads: int, deadline_s: float) -> "RunLimits":
        return cls(threads, time.monotonic() + deadline_s, deadline_s)

    def left_s(self) -> float:
        """Seconds that are left. Raises DeadlineError."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineError("calibration", deadline_s=self.deadline_s)
        return left_s


def measure(
    model: ModelProto,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    *,
    limits: RunLimits,
    progress: Callable[[int], None],
) -> dict[str, Moments]:
    """Moments of what goes into each layer, by the layer's output, pooled over the batches.

    The graph is cut behind these tensors and run by onnxruntime without optimizations. `progress` hears how many
    batches are done.

    Raises:
        StatisticsError: a tensor holds NaN or an infinity; the message names the layer.
        ShapeError: a tensor has another number of channels than the layer.
        ExecutionError: the network fails on the data.
        DeadlineError: the time is over.
    """
    fed = {info.name for info in model.graph.input}
    wanted = list(dict.fromkeys(layer.input for layer in layers if layer.input not in fed))
    session = None
    if wanted:
        content = cut(model, wanted).SerializeToString()
        session = execution.open_session(content, threads=limits.threads, optimization="none")
    pooled: dict[str, Moments] = {}
    for number, batch in enumerate(batches):
        tensors = dict(batch)
        if session is not None:
            arrays = execution.run(session, batch, wanted, deadline_s=limits.left_s())
            tensors.update(zip(wanted, arrays, strict=True))
        for layer in layers:
            moments = _moments(layer, tensors[layer.input], number)
            known = pooled.get(layer.output)
            pooled[layer.output] = moments if known is None else known.merge(moments)
        progress(number + 1)
    return pooled


def cut(model: ModelProto, outputs: Sequence[str]) -> ModelProto:
    """A copy of a model with other outputs and without the nodes and initializers that these do not need."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    needed = set(outputs)
    pending = list(outputs)
    while pending:
        node = producers.get(pending.pop())
        fresh = set() if node is None else set(used_names(node)) - needed
        needed |= fresh
        pending.extend(fresh)
    optional = {tensor.name for tensor in graph.initializer} - needed
    part = GraphProto(
        name=graph.name,
        node=[node for node in graph.node if needed & set(node.output)],
        initializer=[tensor for tensor in graph.initializer if tensor.name in needed],
        sparse_initializer=graph.sparse_initializer,
        input=[info for info in graph.input if info.name not in optional],
        output=[ValueInfoProto(name=name) for name in outputs],
    )
    return ModelProto(graph=part, opset_import=model.opset_import, ir_version=model.ir_version)


def _moments(layer: Layer, array: NDArray[Any], number: int) -> Moments:
    tensor = _tensor(array)
    if tensor.ndim < 2 or tensor.shape[CHANNEL_AXIS] != layer.mean.size:
        raise ShapeError(
            layer.name,
            expected=f"{layer.mean.size} channels on axis {CHANNEL_AXIS}",
            received=f"shape {list(array.shape)} in batch {number}",
        )
    moments = Moments.of(tensor, channel_axis=CHANNEL_AXIS)
    if not moments.is_finite():
        channel = int((moments.mean.isfinite() & moments.m2.isfinite()).to(torch.int8).argmin())
        raise StatisticsError(
            layer.name,
            expected="finite activations",
            received=f"NaN or infinity in channel {channel} of {layer.input!r} in batch {number}",
        )
    return moments


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of the array, which may be read-only; of bfloat16 through float32, which holds it."""
    native = array if array.dtype.kind == "f" else array.astype(np.float32)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


__all__ = ["RunLimits", "cut", "measure"]
