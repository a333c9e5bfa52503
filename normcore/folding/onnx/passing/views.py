"""Transpose, Reshape, Flatten, Squeeze and Unsqueeze: the same numbers along other axes.

A reshape is cut into what it leaves alone at both ends and what it regroups between. An axis of the former keeps its
map. Where several axes become one, C-major, the map of one of them repeats along the result; where one axis becomes
several, its map has to be the same along all of them but one.
"""

import numpy as np
from onnx import NodeProto

from normcore.folding.affine import Affine
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, check_given
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal


class TransposeRule:
    """Tracks the axis."""

    operators = frozenset({"Transpose"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        order = _order(graph, index, demand)
        return [(0, demand.moved(order[demand.axis], len(order)))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        order = _order(graph, index, demand)
        return [(0, demand.moved(order.index(demand.axis), len(order)))]


class SqueezeRule:
    """Tracks the axis; the axes that go have size 1."""

    operators = frozenset({"Squeeze"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        rank = _rank(graph, index)
        kept = [axis for axis in range(rank) if axis not in _axes(graph, index, rank)]
        return [(0, demand.moved(kept[demand.axis], rank))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        rank = _rank(graph, index)
        kept = [axis for axis in range(rank) if axis not in _axes(graph, index, rank)]
        if slot != 0 or demand.axis not in kept:
            raise Refusal(f"{label(graph.node(index))} drops the axis of the channels")
        return [(0, demand.moved(kept.index(demand.axis), len(kept)))]


class UnsqueezeRule:
    """Tracks the axis."""

    operators = frozenset({"Unsqueeze"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        kept = self._kept(graph, index)
        if demand.axis not in kept:
            raise Refusal(f"{label(graph.node(index))} makes the axis of the channels")
        return [(0, demand.moved(kept.index(demand.axis), len(kept)))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        kept = self._kept(graph, index)
        return [(0, demand.moved(kept[demand.axis], _rank(graph, index) + len(_added(graph, index))))]

    @staticmethod
    def _kept(graph: Graph, index: int) -> list[int]:
        rank = _rank(graph, index) + len(_added(graph, index))
        return [axis for axis in range(rank) if axis not in _axes(graph, index, rank)]


class ReshapeRule:
    """Tracks the axis, and repeats its map where axes become one."""

    operators = frozenset({"Reshape", "Flatten"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        source, target = _shapes(graph, index)
        return [(0, _regroup(demand, target, source, label(graph.node(index))))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        if slot != 0:
            raise Refusal(f"it is the shape of {label(graph.node(index))}")
        source, target = _shapes(graph, index)
        return [(0, _regroup(demand, source, target, label(graph.node(index))))]


Symbolic = tuple[int | str, ...]
_MAX_PARTS = 8


def _regroup(demand: Demand, given: Symbolic, wanted: Symbolic, name: str) -> Demand:
    """The map of an axis of shape `given` as one of shape `wanted`, which holds the same elements. Raises Refusal."""
    begin, end = _changed(given, wanted)
    axis = demand.axis
    if axis < begin:
        return demand.moved(axis, len(wanted))
    if axis >= len(given) - end:
        return demand.moved(len(wanted) - len(given) + axis, len(wanted))
    old, new = given[begin : len(given) - end], wanted[begin : len(wanted) - end]
    if len(new) == 1:
        return Demand(_repeat(demand.affine, old, axis - begin, name), begin, len(wanted))
    if len(old) == 1:
        return _thin(demand, new, begin, len(wanted), name)
    raise Refusal(f"{name} splits or merges the axis of the channels: {_text(given)} and {_text(wanted)}")


def _changed(given: Symbolic, wanted: Symbolic) -> tuple[int, int]:
    """How many axes are the same at the front, and at the back."""
    shorter = min(len(given), len(wanted))
    begin = next((axis for axis in range(shorter) if given[axis] != wanted[axis]), shorter)
    room = shorter - begin
    end = next((count for count in range(room) if given[-1 - count] != wanted[-1 - count]), room)
    return begin, end


def _repeat(affine: Affine, sizes: Symbolic, axis: int, name: str) -> Affine:
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        raise Refusal(f"{name} merges the channels with an axis of free size")
    if known[axis] != affine.scale.size:
        raise Refusal(f"{name} merges {known[axis]} channels, which a sum makes {affine.scale.size}")
    shape = [-1 if index == axis else 1 for index in range(len(known))]
    scale, shift = (
        np.broadcast_to(vector.reshape(shape), known).reshape(-1) for vector in (affine.scale, affine.shift)
    )
    return Affine(scale, shift)


def _thin(demand: Demand, sizes: Symbolic, begin: int, rank: int, name: str) -> Demand:
    """The one axis of several along which the map varies. Raises Refusal where there are two."""
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) == len(sizes) and int(np.prod(known)) == demand.channels:
        vectors = [vector.reshape(known) for vector in (demand.affine.scale, demand.affine.shift)]
        for axis in range(len(known)):
            first = [np.moveaxis(vector, axis, 0).reshape(known[axis], -1) for vector in vectors]
            if all((rows == rows[:, :1]).all() for rows in first):
                return Demand(Affine(first[0][:, 0], first[1][:, 0]), begin + axis, rank)
    raise Refusal(f"{name} splits the axis of the channels, and the map varies along more than one part")


def _shapes(graph: Graph, index: int) -> tuple[Symbolic, Symbolic]:
    """Both shapes; free sizes that are provably equal have the same name. Raises Refusal."""
    node = graph.node(index)
    shape = graph.shape(node.input[0])
    if shape is None:
        raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so what {label(node)} regroups")
    source = tuple(f"axis {axis}" if size is None else size for axis, size in enumerate(shape))
    if node.op_type == "Flatten":
        return source, _flattened(source, int(attributes_of(node).get("axis", 1)))
    if attributes_of(node).get("allowzero", 0):
        raise Refusal(f"{label(node)} allows sizes of 0")
    requested = _requested(graph, node)
    if requested is None:
        raise Refusal(f"the shape that {label(node)} makes is computed at run time")
    target: list[int | str] = [
        f"computed {axis}" if size is None else source[axis] if size == 0 and axis < len(source) else size
        for axis, size in enumerate(requested)
    ]
    if None in requested:
        check_given(graph, index)
    unknown = [axis for axis, size in enumerate(requested) if size in (None, -1)]
    if len(unknown) == 1:  # the number of elements decides it, whether the file says -1 or computes it
        target[unknown[0]] = -1
        target[unknown[0]] = _remaining(source, target)
    return source, tuple(target)


def _requested(graph: Graph, node: NodeProto) -> list[int | None] | None:
    """The shape a Reshape asks for, as far as the file determines it: what it says, else what inference found."""
    if len(node.input) < 2:
        return [int(size) for size in attributes_of(node).get("shape", ())]
    found = _sizes(graph, node.input[1], 0)
    inferred = graph.shape(node.output[0])
    if inferred is None or (found is not None and len(found) != len(inferred)):
        return found
    return [ours if ours is not None else theirs for ours, theirs in zip(found or inferred, inferred, strict=True)]


def _sizes(graph: Graph, name: str, depth: int) -> list[int | None] | None:
    """A vector of sizes, None where they are computed; such vectors are joined from parts, some of them constant."""
    if graph.is_constant(name):
        return [int(size) for size in graph.constant(name).reshape(-1)]
    producer = graph.producer(name)
    if producer is not None and graph.node(producer).op_type == "Concat" and depth < _MAX_PARTS:
        parts = [_sizes(graph, part, depth + 1) for part in graph.node(producer).input]
        known = [part for part in parts if part is not None]
        return [size for part in known for size in part] if len(known) == len(parts) else None
    shape = graph.shape(name)
    return [None] * shape[0] if shape is not None and len(shape) == 1 and shape[0] is not None else None


def _remaining(source: Symbolic, target: list[int | str]) -> int | str:
    """What -1 stands for: the elements that the other sizes leave."""
    left = list(source)
    for size in target:
        if isinstance(size, str) and size in left:
            left.remove(size)
    free = [size for size in left if isinstance(size, str)]
    elements = int(np.prod([size for size in left if isinstance(size, int)], dtype=np.int64))
    used = int(np.prod([size for size in target if isinstance(size, int) and size != -1], dtype=np.int64))
    if used and elements % used == 0 and not free:
        return elements // used
    return free[0] if len(free) == 1 and elements == used else "rest"


def _flattened(source: Symbolic, axis: int) -> Symbolic:
    axis = axis + len(source) if axis < 0 else axis

    def merge(sizes: Symbolic, name: str) -> int | str:
        known = [size for size in sizes if isinstance(size, int)]
        if len(known) == len(sizes):
            return int(np.prod(known, dtype=np.int64))
        return sizes[0] if len(sizes) == 1 else name

    return merge(source[:axis], "front"), merge(source[axis:], "back")


def _text(shape: Symbolic) -> str:
    return "(" + ", ".join("?" if isinstance(size, str) else str(size) for size in shape) + ")"


def _order(graph: Graph, index: int, demand: Demand) -> list[int]:
    order = attributes_of(graph.node(index)).get("perm")
    if order is None:
        rank = demand.rank if demand.rank is not None else _rank(graph, index)
        order = range(rank)[::-1]
    return [int(axis) for axis in order]


def _rank(graph: Graph, index: int) -> int:
    node = graph.node(index)
    rank = graph.rank(node.input[0])
    if rank is None:
        raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so what {label(node)} moves")
    return rank


def _added(graph: Graph, index: int) -> list[int]:
    """The axes a node names, as they are written. Raises Refusal."""
    node = graph.node(index)
    if len(node.input) > 1 and node.input[1]:
        return [int(axis) for axis in graph.constant(node.input[1]).reshape(-1)]
    axes = attributes_of(node).get("axes")
    if axes is None:
        raise Refusal(f"{label(node)} drops whichever axes have size 1")
    return [int(axis) for axis in axes]


def _axes(graph: Graph, index: int, rank: int) -> set[int]:
    return {axis + rank if axis < 0 else axis for axis in _added(graph, index)}


__all__ = ["ReshapeRule", "SqueezeRule", "TransposeRule", "UnsqueezeRule"]
