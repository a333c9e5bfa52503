"""The neighbourhood of one batch norm: linear operator -> [Add of a constant per channel] -> batch norm."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normcore.folding.affine import Affine, Vector
from normcore.folding.onnx.batch_norm import CHANNEL_AXIS, read_affine
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import Exact, Stored, check_float

# fmt: off
_NONLINEAR = frozenset((
    "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Gelu", "Mish", "Swish", "Sigmoid",
    "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Softmax", "LogSoftmax", "Hardmax", "Clip", "Erf",
    "Exp", "Log", "Sqrt", "Abs", "Pow", "Sin", "Cos", "MaxPool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "Max",
    "Min",
))
# fmt: on
_JOINING = frozenset(("Concat", "Sum", "Mean"))


@dataclass(frozen=True, slots=True)
class Region:
    """One match, by positions in the graph; `offset` is the other operand of the Add."""

    norm: int
    linear: int
    add: int | None
    offset: NDArray[Any] | None

    def pattern(self, graph: Graph) -> str:
        members = (self.linear, self.add, self.norm)
        return " -> ".join(graph.node(index).op_type for index in members if index is not None)


@dataclass(frozen=True, slots=True)
class Replacement:
    """What a rule will write into its linear operator."""

    weight: Stored
    bias: Stored

    @property
    def residual(self) -> float:
        return max(self.weight.residual, self.bias.residual)


def match_region(graph: Graph, norm: int, linear_operators: Collection[str]) -> Region:
    """The region around a batch norm. Raises Refusal with what stands in its way."""
    name = graph.node(norm).input[0]
    producer = graph.producer(name)
    if producer is None:
        raise Refusal(f"its input is {graph.origin(name)}, with no linear operator before it")
    node = graph.node(producer)
    if node.op_type == "Add":
        region = _match_add(graph, norm, producer, linear_operators)
    elif node.op_type in linear_operators:
        region = Region(norm, producer, None, None)
    else:
        raise Refusal(_why_not(graph, producer))
    graph.check_single_use(name, user=norm)
    if region.add is not None:
        graph.check_single_use(graph.node(region.linear).output[0], user=region.add)
    return region


def read_map(graph: Graph, region: Region, *, channels: int, rank: int) -> Affine:
    """The map of the batch norm, the Add before it included, checked against the linear operator's output.

    Args:
        graph: the graph.
        region: a match.
        channels: size of the linear operator's output on axis 1.
        rank: rank of that output.
    """
    affine = read_affine(graph, graph.node(region.norm))
    if affine.scale.shape != (channels,):
        raise Refusal(
            f"it normalizes {affine.scale.size} channels, and {graph.origin(graph.node(region.linear).output[0])} "
            f"gives {channels}"
        )
    if region.offset is None:
        return affine
    return affine.after(_per_channel(region.offset, channels=channels, rank=rank))


def read_operand(graph: Graph, region: Region, slot: int, role: str) -> NDArray[Any] | None:
    """A constant floating point input of the linear operator; None where it has none. Raises Refusal."""
    linear = graph.node(region.linear)
    if len(linear.input) <= slot or not linear.input[slot]:
        return None
    try:
        value = graph.constant(linear.input[slot])
    except Refusal as refusal:
        raise Refusal(f"the {role} of {label(linear)} is not constant: {refusal}") from None
    check_float(value, linear.input[slot])
    return value


def read_weight(graph: Graph, region: Region) -> NDArray[Any]:
    """The weight, second input of every linear operator. Raises Refusal."""
    weight = read_operand(graph, region, 1, "weight")
    if weight is None:
        raise Refusal(f"{label(graph.node(region.linear))} has no weight")
    return weight


def read_bias(graph: Graph, region: Region, *, channels: int) -> Exact:
    """A convolution's bias, (C,), in float64; zeros where it has none. Raises Refusal."""
    bias = read_operand(graph, region, 2, "bias")
    if bias is None:
        return np.zeros(channels, np.float64)
    if bias.shape != (channels,):
        raise Refusal(f"the bias of {label(graph.node(region.linear))} has shape {bias.shape} for {channels} channels")
    return bias.astype(np.float64)


def absorb(graph: Graph, region: Region, replacement: Replacement) -> None:
    """Write weight and bias, give the linear operator the batch norm's output name, drop the rest."""
    linear = graph.node(region.linear)
    old_weight = linear.input[1]
    old_bias = linear.input[2] if len(linear.input) > 2 else ""
    weight = graph.store(replacement.weight.array, instead_of=old_weight, fallback=f"{old_weight}_folded")
    stem = old_weight.removesuffix("_folded").removesuffix(".weight")
    bias = graph.store(replacement.bias.array, instead_of=old_bias, fallback=f"{stem}.bias")
    output = graph.node(region.norm).output[0]
    graph.take_over(region.linear, [linear.input[0], weight, bias], output=output)
    graph.remove(region.norm)  # and with it the Add, which nothing else used


def _match_add(graph: Graph, norm: int, add: int, linear_operators: Collection[str]) -> Region:
    left, right = graph.node(add).input
    for computed, constant in ((left, right), (right, left)):
        producer = graph.producer(computed)
        if producer is None or graph.node(producer).op_type not in linear_operators:
            continue
        try:
            return Region(norm, producer, add, graph.constant(constant))
        except Refusal as refusal:
            if graph.producer(constant) is None:
                raise Refusal(f"{label(graph.node(add))} before it adds no constant: {refusal}") from None
    raise Refusal(_why_not(graph, add))


def _why_not(graph: Graph, producer: int) -> str:
    node = graph.node(producer)
    origin = f"its input is produced by {label(node)}"
    if node.op_type in _NONLINEAR:
        return f"{origin}, which is not linear"
    if node.op_type in _JOINING:
        return f"{origin}, which joins several tensors"
    if node.op_type == "BatchNormalization":
        return f"{origin}, which is kept itself"
    if node.op_type == "Add" and not any(graph.is_constant(name) for name in node.input):
        return f"{origin}, the sum of two computed tensors"
    return f"{origin}, through which no rule folds"


def _per_channel(constant: NDArray[Any], *, channels: int, rank: int) -> Vector:
    """An Add's constant as one number per channel, (C,) or (). Raises Refusal where it is anything else."""
    check_float(constant, "the constant of the Add")
    shape = (1,) * (rank - constant.ndim) + constant.shape
    others = [size for axis, size in enumerate(shape) if axis != CHANNEL_AXIS]
    if constant.ndim > rank or any(size != 1 for size in others) or shape[CHANNEL_AXIS] not in (1, channels):
        raise Refusal(
            f"the Add before it adds a constant of shape {constant.shape} to a tensor of rank {rank} with {channels} "
            f"channels on axis {CHANNEL_AXIS}: it varies, or broadcasts, over another axis than the channels"
        )
    return constant.reshape(-1).astype(np.float64)


__all__ = ["Region", "Replacement", "absorb", "match_region", "read_bias", "read_map", "read_operand", "read_weight"]
