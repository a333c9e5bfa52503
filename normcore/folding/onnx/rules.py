"""The table of rules, and what one of them says about one normalization."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Protocol

from onnx import NodeProto

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS, bodies, walk_graphs
from normcore.folding.onnx.conv import ConvRule
from normcore.folding.onnx.conv_transpose import ConvTransposeRule
from normcore.folding.onnx.gemm import GemmRule
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.matmul import MatMulRule
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.region import Region, Replacement, match_region
from normcore.folding.report import PlanEntry

BATCH_NORM = "BatchNormalization"


class Rule(Protocol):
    """How one linear operator takes a batch norm that follows it."""

    operator: str
    name: str
    formula: str

    def check(self, graph: Graph, region: Region) -> Replacement:
        """Compute what would be written; changes nothing. Raises Refusal."""
        ...

    def rewrite(self, graph: Graph, region: Region, replacement: Replacement) -> None:
        """Write it."""
        ...


RULES: dict[str, Rule] = {rule.operator: rule for rule in (ConvRule(), ConvTransposeRule(), GemmRule(), MatMulRule())}

_DATA_DEPENDENT = frozenset(
    (
        "LayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "RMSNormalization",
        "LRN",
        "LpNormalization",
        "MeanVarianceNormalization",
    )
)


def fold_normalizations(graph: Graph, *, exclude: Collection[str]) -> Iterator[PlanEntry]:
    """Fold what folds, in the order of the graph, so that a chain of batch norms folds one after the other."""
    for index, node in graph.nodes():
        if _is_normalization(node):
            yield _fold(graph, index, exclude)
        for body in bodies(node):
            for inner in (inner for nested, _ in walk_graphs(body) for inner in nested.node):
                if _is_normalization(inner):
                    yield _entry(graph, inner, f"it is inside a subgraph of {label(node)}")


def _fold(graph: Graph, index: int, exclude: Collection[str]) -> PlanEntry:
    norm = graph.node(index)
    if norm.op_type in _DATA_DEPENDENT:
        return _entry(graph, norm, "its statistics are computed from the data at inference")
    entry = _entry(graph, norm, "excluded by the caller")
    if entry.output in exclude:
        return entry
    try:
        region = match_region(graph, index, RULES)
        linear = graph.node(region.linear)
        rule = RULES[linear.op_type]
        found = replace(entry, pattern=region.pattern(graph), rule=rule.name, formula=rule.formula)
        replacement = rule.check(graph, region)
        rule.rewrite(graph, region, replacement)
    except Refusal as refusal:
        return replace(entry, reason=str(refusal))
    return replace(
        found, status="folded", into=linear.name or linear.output[0], residual=replacement.residual, reason=None
    )


def _entry(graph: Graph, norm: NodeProto, reason: str) -> PlanEntry:
    output = next((name for name in norm.output if name), "")
    shape = graph.shape(norm.input[1]) if len(norm.input) > 1 else None
    return PlanEntry(
        normalization=norm.name or output,
        operator=norm.op_type,
        num_features=shape[0] if shape is not None and len(shape) == 1 else None,
        status="kept",
        output=output,
        reason=reason,
    )


def _is_normalization(node: NodeProto) -> bool:
    return node.domain in STANDARD_DOMAINS and (node.op_type == BATCH_NORM or node.op_type in _DATA_DEPENDENT)


__all__ = ["RULES", "fold_normalizations"]
