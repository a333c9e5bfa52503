"""Cast between datatypes that hold every number of float32: nothing but the storage changes."""

import numpy as np

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal

_WIDE = (np.dtype(np.float32), np.dtype(np.float64))


class CastRule:
    """Everything passes where the datatype stays, or is float32 or float64 on both sides.

    A datatype of 16 bits rounds away what a map before it would keep, and overflows where one behind it would not.
    """

    operators = frozenset({"Cast", "CastLike"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        _check(graph, index)
        return [(0, demand)]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        if slot != 0:
            raise Refusal(f"it names the datatype of {label(graph.node(index))}")
        _check(graph, index)
        return [(0, demand)]


def _check(graph: Graph, index: int) -> None:
    node = graph.node(index)
    before, after = graph.dtype(node.input[0]), graph.dtype(node.output[0])
    if before is None or after is None:
        raise Refusal(f"the file leaves the datatype before or behind {label(node)} free")
    if before != after and not (before in _WIDE and after in _WIDE):
        raise Refusal(f"{label(node)} turns {before} into {after}")


__all__ = ["CastRule"]
