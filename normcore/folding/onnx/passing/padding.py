"""Pad of the other axes: by reflection, repetition or wrapping, or with zeros, which only a multiplication keeps."""

import numpy as np

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal


class PadRule:
    """Everything passes, or the multiplication alone."""

    operators = frozenset({"Pad"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        _check(graph, index, demand)
        return [(0, demand)]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        if slot != 0:
            raise Refusal(f"it is a parameter of {label(graph.node(index))}")
        _check(graph, index, demand)
        return [(0, demand)]


def _check(graph: Graph, index: int, demand: Demand) -> None:
    node = graph.node(index)
    if any(_channel_pads(graph, index, demand.axis)):
        raise Refusal(f"{label(node)} adds channels, or takes some away")
    if attributes_of(node).get("mode", b"constant") != b"constant":
        return
    if _filling(graph, index):
        raise Refusal(f"{label(node)} pads with {_filling(graph, index):.3g}, which the map would change")
    if demand.affine.is_shifting:
        raise ShiftRefusal(f"{label(node)} pads with zeros, which the shift would have to reach too")


def _channel_pads(graph: Graph, index: int, axis: int) -> tuple[int, int]:
    node = graph.node(index)
    attributes = attributes_of(node)
    pads = attributes.get("pads")
    if pads is None:
        pads = graph.constant(node.input[1]).reshape(-1)
    axes = list(range(len(pads) // 2))
    if len(node.input) > 3 and node.input[3]:
        rank = graph.rank(node.input[0])
        named = graph.constant(node.input[3]).reshape(-1)
        if rank is None and bool((named < 0).any()):
            raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so what {label(node)} pads")
        axes = [int(each) + (rank or 0) if each < 0 else int(each) for each in named]
    if axis not in axes:
        return (0, 0)
    place = axes.index(axis)
    return int(pads[place]), int(pads[place + len(axes)])


def _filling(graph: Graph, index: int) -> float:
    node = graph.node(index)
    if len(node.input) > 2 and node.input[2]:
        return float(np.asarray(graph.constant(node.input[2]), np.float64).reshape(-1)[0])
    return float(attributes_of(node).get("value", 0.0))


__all__ = ["PadRule"]
