"""Activations that a positive factor crosses: f(scale x) = scale f(x). Nothing is added on either side."""

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import is_narrow
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal


class ActivationRule:
    """A multiplication by positive numbers passes; an addition in front may stay where it is."""

    operators = frozenset({"Relu", "LeakyRelu", "PRelu"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        node = graph.node(index)
        if demand.affine.is_shifting or not (demand.affine.scale > 0).all():
            raise Refusal(f"its input is produced by {label(node)}, which is not linear")
        _check_range(graph, index)
        return [(0, demand)]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        node = graph.node(index)
        if slot != 0 or not (demand.affine.scale > 0).all():
            raise Refusal(f"{label(node)} is not linear, and only positive scales cross it")
        if demand.affine.is_shifting:
            raise ShiftRefusal(f"{label(node)} is not linear")
        _check_range(graph, index)
        return [(0, demand)]


def _check_range(graph: Graph, index: int) -> None:
    """A slope shrinks or stretches what is negative: one side of it may overflow where the other does not."""
    node = graph.node(index)
    if node.op_type != "Relu" and is_narrow(graph, node.output[0]):
        raise Refusal(f"in float16 one side of {label(node)} could overflow where the other does not")


__all__ = ["ActivationRule"]
