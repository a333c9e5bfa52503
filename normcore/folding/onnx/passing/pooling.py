"""Pools. An average of maps is the map of the average, a maximum only where the map preserves order.

Where an average counts padded zeros, only the multiplication crosses it: a shift would have to reach the zeros too.
Padding of a maximum is minus infinity, which no shift moves.
"""

import numpy as np

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, is_narrow
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal

_REDUCTIONS = frozenset({"ReduceMean", "ReduceMax"})


class AverageRule:
    """AveragePool, GlobalAveragePool and ReduceMean over other axes than the channels'."""

    operators = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        node = graph.node(index)
        if is_narrow(graph, output) and not _shrinks(demand):
            raise Refusal(f"in float16 the tensor before {label(node)} could overflow where its average does not")
        _check_zeros(graph, index, demand)
        return [(0, _reduced_backward(graph, index, demand))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        _check_zeros(graph, index, demand)
        return [(0, _reduced_forward(graph, index, slot, demand))]


class MaximumRule:
    """MaxPool, GlobalMaxPool and ReduceMax over other axes than the channels'."""

    operators = frozenset({"MaxPool", "GlobalMaxPool", "ReduceMax"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        _check_order(graph, index, demand)
        return [(0, _reduced_backward(graph, index, demand))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        _check_order(graph, index, demand)
        return [(0, _reduced_forward(graph, index, slot, demand))]


def _shrinks(demand: Demand) -> bool:
    return not demand.affine.is_shifting and bool((np.abs(demand.affine.scale) <= 1).all())


def _check_zeros(graph: Graph, index: int, demand: Demand) -> None:
    node = graph.node(index)
    attributes = attributes_of(node)
    is_padded = any(attributes.get("pads", ())) or attributes.get("ceil_mode", 0)
    is_padded = is_padded or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    if demand.affine.is_shifting and attributes.get("count_include_pad", 0) and is_padded:
        raise ShiftRefusal(f"{label(node)} counts the zeros it pads with, which the shift would have to reach too")


def _check_order(graph: Graph, index: int, demand: Demand) -> None:
    node = graph.node(index)
    if any(node.output[1:]):
        raise Refusal(f"{label(node)} also gives indices")
    if not (demand.affine.scale > 0).all():
        channel = int(np.argmin(demand.affine.scale))
        raise Refusal(
            f"{label(node)} takes the largest element, and the scale of channel {channel} is "
            f"{demand.affine.scale[channel]:.3g}, which does not keep the order"
        )


def _reduced_backward(graph: Graph, index: int, demand: Demand) -> Demand:
    node = graph.node(index)
    if node.op_type not in _REDUCTIONS:
        return _pooled(graph, index, demand)
    rank, axes, keeps = _reduction(graph, index)
    axis = demand.axis if keeps else [left for left in range(rank) if left not in axes][demand.axis]
    if axis in axes:
        raise Refusal(f"{label(node)} reduces the axis of the channels")
    return demand.moved(axis, rank)


def _reduced_forward(graph: Graph, index: int, slot: int, demand: Demand) -> Demand:
    node = graph.node(index)
    if slot != 0:
        raise Refusal(f"it is a parameter of {label(node)}")
    if node.op_type not in _REDUCTIONS:
        return _pooled(graph, index, demand)
    rank, axes, keeps = _reduction(graph, index)
    if demand.axis in axes:
        raise Refusal(f"{label(node)} reduces the axis of the channels")
    left = list(range(rank)) if keeps else [axis for axis in range(rank) if axis not in axes]
    return demand.moved(left.index(demand.axis), len(left))


def _pooled(graph: Graph, index: int, demand: Demand) -> Demand:
    if demand.axis > 1:
        raise Refusal(f"{label(graph.node(index))} pools over the axis of the channels")
    return demand


def _reduction(graph: Graph, index: int) -> tuple[int, set[int], bool]:
    """Rank of the input, the axes that are reduced, and whether they stay with size 1. Raises Refusal."""
    node = graph.node(index)
    rank = graph.rank(node.input[0])
    if rank is None:
        raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so what {label(node)} reduces")
    attributes = attributes_of(node)
    axes = attributes.get("axes")
    if len(node.input) > 1 and node.input[1]:
        axes = graph.constant(node.input[1]).reshape(-1)
    if axes is None or not len(axes):
        axes = () if attributes.get("noop_with_empty_axes", 0) else range(rank)
    return rank, {int(axis) % rank for axis in axes}, bool(attributes.get("keepdims", 1))


__all__ = ["AverageRule", "MaximumRule"]
