"""What a fold's entry says beyond the rule: eps and its source, who reads the result, which constants changed."""

from collections.abc import Iterable
from dataclasses import replace

from onnx import ModelProto, NodeProto

from normcore.folding.report import Certificate, PlanEntry

_DEFAULT_EPS = 1e-5
_EPS_OPERATORS = frozenset(
    ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization")
)


def describe_folds(
    original: ModelProto, entries: Iterable[PlanEntry], certificate: Certificate | None
) -> tuple[PlanEntry, ...]:
    """The entries of a fold, completed from the original graph and from the regions of the proof.

    Args:
        original: the graph before the fold.
        entries: one per normalization of it.
        certificate: without one, the constants before and after are unknown.
    """
    producers = {name: node for node in original.graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in original.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node.name or node.output[0])
    regions = {name: region for region in (certificate.regions if certificate else ()) for name in region.tensors}
    described = []
    for entry in entries:
        consumers = tuple(readers.get(entry.output, ()))
        known = replace(_with_eps(entry, producers.get(entry.output)), consumers=consumers)
        region = regions.get(entry.output)
        if region is not None and entry.status == "folded":
            known = replace(known, before=region.constants_before, after=region.constants_after)
        described.append(known)
    return tuple(described)


def _with_eps(entry: PlanEntry, node: NodeProto | None) -> PlanEntry:
    if entry.eps is not None or node is None or node.op_type not in _EPS_OPERATORS:
        return entry
    for attribute in node.attribute:
        if attribute.name == "epsilon":
            return replace(entry, eps=attribute.f, eps_source="attribute epsilon of the node")
    return replace(entry, eps=_DEFAULT_EPS, eps_source="default of the operator")


__all__ = ["describe_folds"]
