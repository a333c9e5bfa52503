"""Gain and bias of a norm whose statistics come from the data: they alone can go forward, the norm itself stays."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS
from normcore.folding.affine import Affine
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, read_operand
from normcore.folding.onnx.outcome import Outcome, name_of
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import Stored
from normcore.folding.onnx.walk import Walk

_LAST_AXIS = frozenset({"LayerNormalization", "RMSNormalization"})
_CHANNELS = frozenset({"InstanceNormalization", "GroupNormalization"})
_OPSET_OF_GAIN_PER_CHANNEL = 21  # before it, GroupNormalization had one gain per group


@dataclass(frozen=True, slots=True)
class Gain:
    """One such norm."""

    norm: int


def gains(graph: Graph) -> Iterator[Gain]:
    """Every norm with a gain."""
    for index, node in graph.nodes():
        if node.op_type in _LAST_AXIS | _CHANNELS and node.domain in STANDARD_DOMAINS and len(node.input) > 1:
            yield Gain(index)


def move_gain(graph: Graph, gain: Gain) -> Outcome:
    """Move gain and bias of a norm into everything that reads it. Raises Refusal."""
    node = graph.node(gain.norm)
    demand = _demand(graph, gain.norm)
    if not demand.affine.is_shifting and (demand.affine.scale == 1).all():
        raise Refusal("its gain is 1 and its bias 0 already")
    walk = Walk(graph)
    walk.push(node.output[0], demand)
    if walk.inserted > 0:
        raise Refusal(f"the graph would grow by {walk.inserted} nodes")
    outcome = Outcome(
        direction="forward",
        pattern=" -> ".join([node.op_type, *walk.path]),
        rules=tuple(dict.fromkeys(edit.rule for edit in walk.edits)),
        formulas=("gain' = 1; bias' = 0", *dict.fromkeys(edit.formula for edit in walk.edits)),
        into=tuple(name_of(graph, edit.index) for edit in walk.edits),
        residual=walk.residual,
        option="move_gains",
    )
    operands = {1: _filled(graph, gain.norm, 1, 1.0)}
    if len(node.input) > 2 and node.input[2]:
        operands[2] = _filled(graph, gain.norm, 2, 0.0)
    walk.write()
    Edit(gain.norm, "gain", "", operands, changes_output=True).rewrite(graph)
    return outcome


def _filled(graph: Graph, index: int, slot: int, value: float) -> Stored:
    operand = graph.constant(graph.node(index).input[slot])
    return Stored(np.full(operand.shape, value, operand.dtype), 0.0)


def _demand(graph: Graph, index: int) -> Demand:
    """Gain and bias as a map per channel. Raises Refusal."""
    node = graph.node(index)
    rank = graph.rank(node.input[0])
    if any(node.output[1:]):
        raise Refusal(f"{label(node)} also gives its statistics")
    if rank is None:
        raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so what {label(node)} scales")
    scale = read_operand(graph, index, 1, "gain")
    bias = read_operand(graph, index, 2, "bias")
    if scale is None or scale.ndim != 1 or (bias is not None and bias.shape != scale.shape):
        raise Refusal(f"the gain of {label(node)} is no vector over one axis")
    axis = 1
    if node.op_type in _LAST_AXIS:
        axis = rank - 1
        if int(attributes_of(node).get("axis", -1)) not in (-1, axis):
            raise Refusal(f"{label(node)} normalizes over several axes")
    elif node.op_type == "GroupNormalization" and graph.opset < _OPSET_OF_GAIN_PER_CHANNEL:
        raise Refusal(f"{label(node)} of opset {graph.opset} has one gain per group")
    shift = np.zeros(scale.size) if bias is None else bias.astype(np.float64)
    affine = Affine(scale.astype(np.float64), shift)
    shape = graph.shape(node.input[0])
    if shape is None or shape[axis] != scale.size:
        raise Refusal(f"the file leaves free how many channels there are on axis {axis}")
    return Demand(affine, axis, rank)


__all__ = ["Gain", "gains", "move_gain"]
