"""Identity, and Dropout outside training."""

import numpy as np

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal


class IdentityRule:
    """Everything passes."""

    operators = frozenset({"Identity", "Dropout"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        _check(graph, index)
        return [(0, demand)]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        _check(graph, index)
        if slot != 0:
            raise Refusal(f"it is a parameter of {label(graph.node(index))}")
        return [(0, demand)]


def _check(graph: Graph, index: int) -> None:
    node = graph.node(index)
    if any(node.output[1:]):
        raise Refusal(f"{label(node)} also gives its mask")
    if len(node.input) > 2 and node.input[2]:
        try:
            is_training = bool(np.any(graph.constant(node.input[2])))
        except Refusal as refusal:
            raise Refusal(f"{label(node)} may be in training mode: {refusal}") from None
        if is_training:
            raise Refusal(f"{label(node)} is in training mode")


__all__ = ["IdentityRule"]
