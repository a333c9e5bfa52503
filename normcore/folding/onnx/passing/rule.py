"""What a passing rule answers."""

from typing import Protocol

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph

Demands = list[tuple[int, Demand]]


class PassRule(Protocol):
    """How a map per channel crosses an operator."""

    operators: frozenset[str]

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        """Maps of the inputs, by slot, that together are the map of this output. Raises Refusal."""
        ...

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        """Maps of the outputs, by their position, that the map of this input becomes. Raises Refusal."""
        ...


__all__ = ["Demands", "PassRule"]
