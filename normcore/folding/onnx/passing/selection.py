"""Slice and Split: part of the positions, or part of the channels, each of which keeps its own map."""

import numpy as np
from numpy.typing import NDArray

from normcore.folding.affine import Affine, identity
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, check_given
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal

_MAX_CHANNELS = 1 << 24


class SliceRule:
    """Channels that are cut away can have any map: they get none."""

    operators = frozenset({"Slice"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        chosen = _sliced(graph, index, demand.axis)
        if chosen is None:
            return [(0, demand)]
        size = _size(graph, index, demand.axis)
        return [(0, demand.mapped(_spread(demand.affine, np.arange(size)[chosen], size)))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        if slot != 0:
            raise Refusal(f"it is a parameter of {label(graph.node(index))}")
        chosen = _sliced(graph, index, demand.axis)
        return [(0, demand if chosen is None else demand.mapped(demand.affine.take(chosen)))]


class SplitRule:
    """Backward, only along the channels: other parts then have channels of their own."""

    operators = frozenset({"Split"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        node = graph.node(index)
        if _split_axis(graph, index) != demand.axis:
            raise Refusal(f"{label(node)} splits another axis than the channels, and its other parts would change too")
        starts = _starts(graph, index, demand.axis)
        place = list(node.output).index(output)
        chosen = np.arange(starts[place], starts[place + 1])
        return [(0, demand.mapped(_spread(demand.affine, chosen, starts[-1])))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        node = graph.node(index)
        if slot != 0:
            raise Refusal(f"it is a parameter of {label(node)}")
        places = [place for place, name in enumerate(node.output) if name]
        if _split_axis(graph, index) != demand.axis:
            return [(place, demand) for place in places]
        starts = _starts(graph, index, demand.axis)
        if starts[-1] != demand.channels:
            raise Refusal(f"{label(node)} splits {starts[-1]} channels, not {demand.channels}")
        parts = [np.arange(starts[place], starts[place + 1]) for place in places]
        return [(place, demand.mapped(demand.affine.take(part))) for place, part in zip(places, parts, strict=True)]


def _spread(affine: Affine, chosen: NDArray[np.integer], size: int) -> Affine:
    """The map on these channels of `size`, and none on the others. Raises Refusal."""
    if len(chosen) != affine.scale.size:
        raise Refusal(f"it normalizes {affine.scale.size} channels of {len(chosen)} that are cut out")
    whole = identity(size)
    whole.scale[chosen] = affine.scale
    whole.shift[chosen] = affine.shift
    return whole


def _sliced(graph: Graph, index: int, axis: int) -> slice | None:
    """What is cut out of an axis; None where that is left alone. Raises Refusal."""
    node = graph.node(index)
    attributes = attributes_of(node)
    names = ("starts", "ends", "axes", "steps")
    given = {name: attributes[name] for name in names if name in attributes}
    for name, source in zip(names, node.input[1:], strict=False):
        if source:
            given[name] = graph.constant(source).reshape(-1)
    starts, ends = list(given["starts"]), list(given["ends"])
    axes = [int(named) for named in given.get("axes", range(len(starts)))]
    if any(named < 0 for named in axes):
        rank = graph.rank(node.input[0])
        if rank is None:
            raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so what {label(node)} cuts")
        axes = [named + rank if named < 0 else named for named in axes]
    if axis not in axes:
        return None
    place = axes.index(axis)
    step = int(given["steps"][place]) if "steps" in given else 1
    if step <= 0:
        raise Refusal(f"{label(node)} reverses the channels")
    return slice(int(starts[place]), int(ends[place]), step)


def _size(graph: Graph, index: int, axis: int) -> int:
    shape = graph.shape(graph.node(index).input[0])
    size = None if shape is None or axis >= len(shape) else shape[axis]
    if size is None or size > _MAX_CHANNELS:
        raise Refusal(f"the file leaves free how many channels {label(graph.node(index))} cuts")
    return size


def _split_axis(graph: Graph, index: int) -> int:
    node = graph.node(index)
    axis = int(attributes_of(node).get("axis", 0))
    if axis >= 0:
        return axis
    rank = graph.rank(node.input[0])
    if rank is None:
        raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so what {label(node)} splits")
    return axis + rank


def _starts(graph: Graph, index: int, axis: int) -> list[int]:
    """Where each part begins, and the end of the last. Raises Refusal."""
    node = graph.node(index)
    shapes = [graph.shape(name) for name in node.output]
    sizes = [None if shape is None else shape[axis] for shape in shapes]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        check_given(graph, index)
        raise Refusal(f"the file leaves free how {label(node)} splits the channels")
    return [0, *np.cumsum(known).tolist()]


__all__ = ["SliceRule", "SplitRule"]
