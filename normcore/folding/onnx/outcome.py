"""What a fold wrote, in the words of the report."""

from dataclasses import dataclass

from normcore.folding.onnx.graph import Graph
from normcore.folding.report import Direction


@dataclass(frozen=True, slots=True)
class Outcome:
    """See the fields of the same names of `PlanEntry`."""

    direction: Direction
    pattern: str
    rules: tuple[str, ...]
    formulas: tuple[str, ...]
    into: tuple[str, ...]
    residual: float
    option: str | None = None


def name_of(graph: Graph, index: int) -> str:
    """Name of a node, or its output where it has none."""
    node = graph.node(index)
    return str(node.name or node.output[0])


__all__ = ["Outcome", "name_of"]
