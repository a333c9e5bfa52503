"""Parallel branches of one tensor that are added up become one convolution, as in RepVGG.

    conv_k(x) + conv_1(x) + norm(x) = conv_k'(x),    k' = k + embedded 1 + scale on the centre tap, b' = b + b_1 + shift

The smaller kernel lies in the larger one where its padding puts it: tap i of a kernel with padding p reads position
i - p. Both need the same strides, groups and output size; a norm is a convolution of one tap and stride 1 whose input
channel, counted within its group, is its output channel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS
from normcore.folding.filters import Exact, dirac, embed
from normcore.folding.onnx.batch_norm import read_affine
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, read_bias, read_weight
from normcore.folding.onnx.outcome import Outcome, name_of
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import store

_BRANCHES = frozenset({"Conv", "BatchNormalization"})


@dataclass(frozen=True, slots=True)
class Pair:
    """Two branches of one sum: the one that stays, and the one that goes into it."""

    total: int
    kept: int
    gone: int


@dataclass(frozen=True, slots=True)
class _Kernel:
    weight: Exact
    bias: Exact
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int


def pairs(graph: Graph) -> Iterator[Pair]:
    """Branches that might go together: they read the same tensor, and nothing but the sum reads them."""
    for total, node in graph.nodes():
        if node.op_type not in ("Add", "Sum") or node.domain not in STANDARD_DOMAINS or graph.is_locked(total):
            continue
        branches = [index for name in node.input if (index := _branch(graph, total, name)) is not None]
        for gone in branches:
            for kept in branches:
                if kept != gone and _fits(graph, kept, gone):
                    yield Pair(total, kept, gone)


def is_pair(graph: Graph, pair: Pair) -> bool:
    """Whether both branches are still there."""
    members = (pair.total, pair.kept, pair.gone)
    if not all(index in graph for index in members):
        return False
    names = list(graph.node(pair.total).input)
    both = [graph.node(index).output[0] in names for index in members[1:]]
    return all(both) and _fits(graph, pair.kept, pair.gone)


def merge(graph: Graph, pair: Pair) -> Outcome:
    """Merge two branches. Raises Refusal."""
    kept = _convolution(graph, pair.kept)
    weight, bias = kept.weight, kept.bias
    if graph.node(pair.gone).op_type == "Conv":
        other = _convolution(graph, pair.gone)
        weight = weight + _embedded(kept, other, graph, pair)
        bias = bias + other.bias
    else:
        affine = read_affine(graph, graph.node(pair.gone))
        if kept.weight.shape[1] * kept.groups != affine.scale.size or len(kept.weight) != affine.scale.size:
            raise Refusal(f"{label(graph.node(pair.kept))} makes another number of channels than it reads")
        ones = np.ones((affine.scale.size, 1, *[1] * len(kept.begins)))
        nothing = (0,) * len(kept.begins)
        single = (1,) * len(kept.begins)
        point = _Kernel(ones, affine.shift, nothing, nothing, single, single, kept.groups)
        offset = _offset(kept, point, graph, pair)
        weight = weight + dirac(affine.scale, groups=kept.groups, kernel=kept.weight.shape[2:], offset=offset)
        bias = bias + affine.shift
    dtype = read_weight(graph, pair.kept).dtype
    operands = {
        1: store(weight, dtype, "weight", rows=weight.reshape(len(weight), -1)),
        2: store(bias, dtype, "bias"),
    }
    edit = Edit(pair.kept, "branches", "W' = W + embedded branch; b' = b + b of the branch", operands)
    members = [pair.kept, pair.gone, pair.total]
    outcome = Outcome(
        direction="merge",
        pattern=" + ".join(graph.node(index).op_type for index in members[:2]),
        rules=("branches",),
        formulas=(edit.formula,),
        into=(name_of(graph, pair.kept),),
        residual=edit.residual,
    )
    edit.rewrite(graph)
    _join(graph, pair)
    return outcome


def _branch(graph: Graph, total: int, name: str) -> int | None:
    index = graph.producer(name)
    if index is None or graph.node(index).op_type not in _BRANCHES or graph.is_locked(index):
        return None
    sites = [(total, slot) for slot, used in enumerate(graph.node(total).input) if used == name]
    return index if len(sites) == 1 and graph.consumers(name, with_shapes=True) == sites else None


def _fits(graph: Graph, kept: int, gone: int) -> bool:
    """Whether both read the same, and the one that stays is the larger kernel."""
    nodes = graph.node(kept), graph.node(gone)
    if nodes[0].op_type != "Conv" or nodes[0].input[0] != nodes[1].input[0] or graph.is_output(nodes[1].output[0]):
        return False
    if graph.is_output(nodes[0].output[0]):
        return False
    sizes = [_size(graph, index) for index in (kept, gone)]
    return sizes[0] > sizes[1] or (sizes[0] == sizes[1] and kept < gone)


def _size(graph: Graph, index: int) -> int:
    if graph.node(index).op_type != "Conv":
        return 0
    shape = graph.shape(graph.node(index).input[1])
    return 0 if shape is None else int(np.prod([size or 0 for size in shape[2:]]))


def _convolution(graph: Graph, index: int) -> _Kernel:
    """Raises Refusal."""
    weight = read_weight(graph, index)
    if weight.ndim < 3:
        raise Refusal(f"the convolution's weight has shape {weight.shape}, which is no filter")
    rank = weight.ndim - 2
    attributes = attributes_of(graph.node(index))
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise Refusal(f"{label(graph.node(index))} finds its padding at run time (auto_pad)")
    pads = _integers(attributes, "pads", [0] * 2 * rank)
    return _Kernel(
        weight=weight.astype(np.float64),
        bias=read_bias(graph, index, channels=weight.shape[0]),
        begins=pads[:rank],
        ends=pads[rank:],
        strides=_integers(attributes, "strides", [1] * rank),
        dilations=_integers(attributes, "dilations", [1] * rank),
        groups=int(attributes.get("group", 1)),
    )


def _integers(attributes: dict[str, Any], name: str, default: list[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in attributes.get(name, default))


def _embedded(kept: _Kernel, other: _Kernel, graph: Graph, pair: Pair) -> Exact:
    if other.weight.shape[:2] != kept.weight.shape[:2]:
        raise Refusal(f"the branches of {label(graph.node(pair.total))} have different channels or groups")
    offset = _offset(kept, other, graph, pair)
    steps = tuple(max(1, theirs // ours) for theirs, ours in zip(other.dilations, kept.dilations, strict=True))
    return embed(other.weight, kernel=kept.weight.shape[2:], offset=offset, dilation=steps)


def _offset(kept: _Kernel, other: _Kernel, graph: Graph, pair: Pair) -> tuple[int, ...]:
    """Where the first tap of the smaller kernel lies in the larger one. Raises Refusal."""
    if kept.strides != other.strides or kept.groups != other.groups:
        raise Refusal(f"the branches of {label(graph.node(pair.total))} have different strides or groups")
    offsets = []
    for axis, (size, inner) in enumerate(zip(kept.weight.shape[2:], other.weight.shape[2:], strict=True)):
        ours, theirs = kept.dilations[axis], other.dilations[axis]
        begin = kept.begins[axis] - other.begins[axis]
        reach = begin + theirs * (inner - 1)
        end = kept.ends[axis] - other.ends[axis]
        lies_on_taps = begin % ours == 0 and (inner == 1 or theirs % ours == 0)
        if not lies_on_taps or begin < 0 or reach > ours * (size - 1) or reach + end != ours * (size - 1):
            raise Refusal(
                f"the kernel of {label(graph.node(pair.gone))} does not lie within that of "
                f"{label(graph.node(pair.kept))}"
            )
        offsets.append(begin // ours)
    return tuple(offsets)


def _join(graph: Graph, pair: Pair) -> None:
    """Drop the branch from the sum, and the sum where one summand is left."""
    gone, kept = graph.node(pair.gone).output[0], graph.node(pair.kept).output[0]
    graph.rename_changed(kept)
    kept = graph.node(pair.kept).output[0]
    summands = [name for name in graph.node(pair.total).input if name != gone]
    if summands == [kept]:
        graph.replace(pair.total, by=kept)
    else:
        graph.set_inputs(pair.total, summands)


__all__ = ["Pair", "is_pair", "merge", "pairs"]
