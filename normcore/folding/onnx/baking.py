"""Weights that the graph itself normalizes: weight norm, spectral norm, weight standardization, decomposed or not.

They are computed from constants alone, so that every run computes the same; the result takes their place.
"""

from collections.abc import Iterator

import numpy as np

from normcore.folding.onnx.constants import label
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.outcome import Outcome, name_of
from normcore.folding.onnx.refusal import Refusal

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# fmt: off
_NORMALIZING = frozenset((
    "ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceMean", "ReduceMax", "LpNormalization",
    "BatchNormalization", "InstanceNormalization", "LayerNormalization",
))
# fmt: on
_MAX_NODES = 256


def computed_weights(graph: Graph) -> Iterator[tuple[int, str]]:
    """Linear nodes, each with its weight where that is the result of a normalization of constants."""
    for index, node in graph.nodes():
        if node.op_type in _LINEAR and len(node.input) > 1 and _is_normalized(_operators(graph, node.input[1])):
            yield index, node.input[1]


def bake(graph: Graph, index: int, weight: str) -> Outcome:
    """Store a computed weight. Raises Refusal."""
    if graph.is_output(weight):
        raise Refusal(f"{weight!r} is an output of the graph")
    if graph.has_other_results(weight):
        raise Refusal(f"{graph.origin(weight)} makes more than this weight")
    try:
        value = graph.constant(weight)
    except Refusal as refusal:
        raise Refusal(f"the weight of {label(graph.node(index))} is not constant: {refusal}") from None
    if not np.isfinite(value.astype(np.float64)).all():
        raise Refusal(f"the weight of {label(graph.node(index))} holds NaN or infinity")
    pattern = [*_operators(graph, weight), graph.node(index).op_type]
    graph.bake(weight, value)
    return Outcome(
        direction="in place",
        pattern=" -> ".join(pattern),
        rules=("bake",),
        formulas=("W' = the computed weight",),
        into=(name_of(graph, index),),
        residual=0.0,
    )


def _is_normalized(operators: list[str]) -> bool:
    """Whether these operators compute a norm; spectral norm divides by products with its vectors."""
    return not _NORMALIZING.isdisjoint(operators) or ("MatMul" in operators and operators[-1] in ("Div", "Mul"))


def _operators(graph: Graph, name: str) -> list[str]:
    """Operators that compute a tensor, the last one last, as far back as a few hundred."""
    found: dict[int, str] = {}
    pending = [name]
    while pending and len(found) < _MAX_NODES:
        index = graph.producer(pending.pop())
        if index is not None and index not in found:
            found[index] = graph.node(index).op_type
            pending.extend(source for source in graph.node(index).input if source)
    return [found[index] for index in sorted(found) if found[index] != "Constant"]


__all__ = ["bake", "computed_weights"]
