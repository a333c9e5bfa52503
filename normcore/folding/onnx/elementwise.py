"""Add, Sub, Mul and Div by a constant, in either operand order, as the affine map they are.

    x + c, c + x -> (1, c)    x - c -> (1, -c)    c - x -> (-1, c)    x * c, c * x -> (c, 0)    x / c -> (1 / c, 0)

c / x is no affine map. The constant has to vary along one axis only, and must not enlarge what it is applied to.
"""

from dataclasses import dataclass

import numpy as np

from normcore.folding.affine import Affine
from normcore.folding.filters import Exact
from normcore.folding.onnx.constants import label
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import check_float

OPERATORS = frozenset({"Add", "Sub", "Mul", "Div"})
SCALING = frozenset({"Mul", "Div"})


@dataclass(frozen=True, slots=True)
class Elementwise:
    """One such node: the slot of what is computed, and both constants in the shape they broadcast with."""

    index: int
    slot: int
    scale: Exact
    shift: Exact

    @property
    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(self.scale.shape, self.shift.shape)

    def axis(self, rank: int) -> int | None:
        """The one axis of a tensor of this rank along which the constant varies; None where it varies nowhere."""
        if len(self.shape) > rank:
            return None
        shape = (1,) * (rank - len(self.shape)) + self.shape
        varying = [axis for axis, size in enumerate(shape) if size != 1]
        return varying[0] if len(varying) == 1 else None

    def on(self, graph: Graph, axis: int, rank: int | None, *, channels: int) -> Affine:
        """The map along an axis with this many channels. Raises Refusal."""
        node = graph.node(self.index)
        if rank is None:
            raise Refusal(
                f"the file leaves the rank of {node.input[self.slot]!r} free, and so what {label(node)} scales"
            )
        shape = (1,) * (rank - len(self.shape)) + self.shape
        others = [size for index, size in enumerate(shape) if index != axis]
        if len(self.shape) > rank or any(size != 1 for size in others) or shape[axis] not in (1, channels):
            raise Refusal(
                f"{label(node)} before it has a constant of shape {self.shape} for a tensor of rank {rank} with "
                f"{channels} channels on axis {axis}: it varies, or broadcasts, over another axis than the channels"
            )
        present = graph.shape(node.input[self.slot])
        if len(self.shape) == rank and (present is None or len(present) != rank):
            raise Refusal(f"{label(node)} may make a tensor of rank {rank} of one of a lower rank")
        if shape[axis] > 1 and (present is None or present[axis] != channels):
            raise Refusal(f"{label(node)} may make {channels} channels of one, and the operator before it cannot")
        vectors = (np.broadcast_to(constant.reshape(-1), (channels,)) for constant in (self.scale, self.shift))
        return Affine(*vectors)


def read_elementwise(graph: Graph, index: int) -> Elementwise:
    """A node as a map. Raises Refusal where both or none of its operands are constant, and for c / x."""
    node = graph.node(index)
    reasons = []
    for slot in (0, 1):
        try:
            constant = graph.constant(node.input[1 - slot])
        except Refusal as refusal:
            reasons.append(refusal)
            continue
        if graph.is_constant(node.input[slot]):
            raise Refusal(f"{label(node)} computes a constant")
        check_float(constant, node.input[1 - slot])
        return Elementwise(index, slot, *_map(node.op_type, constant.astype(np.float64), slot, label(node)))
    if all(graph.producer(name) is not None for name in node.input):
        raise Refusal(f"{label(node)} joins two computed tensors")
    given = next(position for position in (1, 0) if graph.producer(node.input[position]) is None)
    raise Refusal(f"{label(node)} has no constant operand: {reasons[1 - given]}")


def _map(operator: str, constant: Exact, slot: int, name: str) -> tuple[Exact, Exact]:
    one, zero = np.ones_like(constant), np.zeros_like(constant)
    if not np.isfinite(constant).all():
        raise Refusal(f"the constant of {name} holds NaN or infinity")
    if operator == "Add":
        return one, constant
    if operator == "Sub":
        return (one, -constant) if slot == 0 else (-one, constant)
    if operator == "Mul":
        return constant, zero
    if slot == 1:
        raise Refusal(f"{name} divides by what is computed, which is not linear")
    if not constant.all():
        raise Refusal(f"{name} divides by zero")
    return 1 / constant, zero


__all__ = ["OPERATORS", "SCALING", "Elementwise", "read_elementwise"]
