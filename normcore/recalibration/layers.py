"""Which batch norms of a graph have statistics that data can replace, which have not, and who comes after whom."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS, bodies, walk_graphs
from normcore.folding.onnx.batch_norm import check_mode, read_eps
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.names import used_names
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.seeds import BATCH_NORM
from normcore.recalibration.report import Kept

_MEAN, _VAR = 3, 4
_ROLES = {_MEAN: "mean", _VAR: "variance"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A batch norm with frozen statistics of its own.

    Attributes:
        index: position of its node in the graph.
        name: its own, or its output where it has none.
        input: the tensor it normalizes.
        output: the tensor it makes.
        mean: running mean, (C,), in the datatype it is stored in.
        var: running variance, (C,), in the datatype it is stored in.
        eps: what it adds to the variance.
        depth: how many such layers lie, one after the other, between the inputs and this one.
    """

    index: int
    name: str
    input: str
    output: str
    mean: NDArray[np.generic]
    var: NDArray[np.generic]
    eps: float
    depth: int


def find_layers(graph: Graph) -> tuple[tuple[Layer, ...], tuple[Kept, ...]]:
    """The layers, in the order of the graph, and the batch norms that are none, each with the reason."""
    layers: list[Layer] = []
    kept: list[Kept] = []
    depths: dict[str, int] = {}  # of tensors
    owners = Counter(name for _, node in graph.nodes() if _is_batch_norm(node) for name in {*node.input[_MEAN:]})
    for index, node in graph.nodes():
        depth = max((depths.get(name, 0) for name in used_names(node)), default=0)
        kept += [Kept(_name(inner), f"it is inside a subgraph of {label(node)}") for inner in _inner_norms(node)]
        if _is_batch_norm(node):
            try:
                layers.append(_read_layer(graph, index, owners, depth))
                depth += 1
            except Refusal as refusal:
                kept.append(Kept(_name(node), str(refusal)))
        depths.update((name, depth) for name in node.output if name)
    return tuple(layers), tuple(kept)


def _read_layer(graph: Graph, index: int, owners: Counter[str], depth: int) -> Layer:
    norm = graph.node(index)
    check_mode(graph, norm)
    if graph.is_constant(norm.input[0]):
        raise Refusal("its input is the same in every run, so data say nothing about it")
    for slot, role in _ROLES.items():
        if owners[norm.input[slot]] > 1:
            raise Refusal(
                f"its {role} {norm.input[slot]!r} belongs to another batch norm too: one tensor cannot hold the "
                "statistics of two layers; export the network with statistics per layer"
            )
    mean, var = (_constant(graph, norm, slot) for slot in _ROLES)
    if mean.ndim != 1 or mean.shape != var.shape or not {mean.dtype.kind, var.dtype.kind} <= {"f", "V"}:
        raise Refusal(f"its statistics are not floating vectors of one length: shapes {mean.shape} and {var.shape}")
    return Layer(index, _name(norm), norm.input[0], norm.output[0], mean, var, read_eps(norm), depth)


def _constant(graph: Graph, norm: NodeProto, slot: int) -> NDArray[np.generic]:
    try:
        return graph.constant(norm.input[slot])
    except Refusal as refusal:
        raise Refusal(f"its {_ROLES[slot]} is not constant: {refusal}") from None


def _is_batch_norm(node: NodeProto) -> bool:
    return node.op_type == BATCH_NORM and node.domain in STANDARD_DOMAINS


def _inner_norms(node: NodeProto) -> Iterator[NodeProto]:
    for body in bodies(node):
        for graph, _ in walk_graphs(body):
            yield from (inner for inner in graph.node if _is_batch_norm(inner))


def _name(norm: NodeProto) -> str:
    return norm.name or norm.output[0]


__all__ = ["Layer", "find_layers"]
