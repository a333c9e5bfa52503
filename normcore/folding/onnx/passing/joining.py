"""Concat and sums: a map wanted of the whole is wanted of every part."""

import numpy as np

from normcore.folding.affine import Affine, identity
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, is_narrow
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal


class ConcatRule:
    """Along the channels each part has its own; along another axis all have the same."""

    operators = frozenset({"Concat"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        slots = range(len(graph.node(index).input))
        if _concat_axis(graph, index) != demand.axis:
            return [(slot, demand) for slot in slots]
        starts = _starts(graph, index, demand)
        parts = [np.arange(starts[slot], starts[slot + 1]) for slot in slots]
        return [(slot, demand.mapped(demand.affine.take(part))) for slot, part in zip(slots, parts, strict=True)]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        node = graph.node(index)
        if _concat_axis(graph, index) != demand.axis:
            raise Refusal(f"{label(node)} joins it with what is not normalized")
        starts = _starts(graph, index, None)
        if starts[slot + 1] - starts[slot] != demand.channels:
            raise Refusal(f"{label(node)} joins another number of channels than {demand.channels}")
        whole = identity(starts[-1])
        whole.scale[starts[slot] : starts[slot + 1]] = demand.affine.scale
        whole.shift[starts[slot] : starts[slot + 1]] = demand.affine.shift
        return [(0, demand.mapped(whole))]


class SumRule:
    """scale (a + b) + shift = (scale a + shift) + scale b; backward only."""

    operators = frozenset({"Sum", "Add", "Sub"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        node = graph.node(index)
        if is_narrow(graph, output):
            raise Refusal(f"in float16 the summands of {label(node)} could overflow where their sum does not")
        if demand.rank is None:
            raise Refusal(f"the file leaves the rank of what {label(node)} adds free")
        wanted = []
        for slot, name in enumerate(node.input):
            rank = graph.rank(name)
            if rank is None or rank - demand.rank + demand.axis < 0:
                raise Refusal(f"{label(node)} adds {name!r}, whose axes are not known")
            affine = demand.affine if slot == 0 else Affine(demand.affine.scale, np.zeros(demand.channels))
            wanted.append((slot, Demand(affine, rank - demand.rank + demand.axis, rank)))
        return wanted

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        raise Refusal(f"{label(graph.node(index))} adds it to what is not normalized")


def _concat_axis(graph: Graph, index: int) -> int:
    node = graph.node(index)
    axis = int(attributes_of(node)["axis"])
    if axis >= 0:
        return axis
    rank = graph.rank(node.output[0])
    if rank is None:
        raise Refusal(f"the file leaves the rank of what {label(node)} joins free")
    return axis + rank


def _starts(graph: Graph, index: int, demand: Demand | None) -> list[int]:
    """Where the channels of each part begin, and the end of the last. Raises Refusal."""
    node = graph.node(index)
    axis = _concat_axis(graph, index)
    shapes = [graph.shape(name) for name in node.input]
    known = [shape[axis] for shape in shapes if shape is not None and len(shape) > axis]
    sizes = [size for size in known if size is not None]
    if len(sizes) < len(shapes):
        raise Refusal(f"the file leaves free how many channels each input of {label(node)} has")
    if demand is not None and sum(sizes) != demand.channels:
        raise Refusal(f"it normalizes {demand.channels} channels, and {label(node)} gives {sum(sizes)}")
    return [0, *np.cumsum(sizes).tolist()]


__all__ = ["ConcatRule", "SumRule"]
