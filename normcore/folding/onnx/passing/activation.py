"""Activations that a positive factor crosses: f(scale x) = scale f(x). Nothing is added on either side."""

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal


class ActivationRule:
    """A multiplication by positive numbers passes; an addition in front may stay where it is."""

    operators = frozenset({"Relu", "LeakyRelu", "PRelu"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        node = graph.node(index)
        if demand.affine.is_shifting or not (demand.affine.scale > 0).all():
            raise Refusal(f"its input is produced by {label(node)}, which is not linear")
        return [(0, demand)]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        node = graph.node(index)
        if slot != 0 or not (demand.affine.scale > 0).all():
            raise Refusal(f"{label(node)} is not linear, and only positive scales cross it")
        if demand.affine.is_shifting:
            raise ShiftRefusal(f"{label(node)} is not linear")
        return [(0, demand)]


__all__ = ["ActivationRule"]
