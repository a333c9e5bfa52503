"""BatchNormalization nodes: are they frozen, which affine map do they apply, and how they take another one.

A map that follows changes what the norm multiplies with and adds: weight' = scale weight, bias' = scale bias + shift.
One that comes before moves into the statistics where it can be undone, so that what is subtracted stays a mean:
mean' = (mean - shift) / scale, weight' = scale weight; else into mean' = 0, var' = 1.
"""

import numpy as np
from onnx import NodeProto

from normcore.errors import StatisticsError
from normcore.folding.affine import Affine, affine_of
from normcore.folding.filters import Exact
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import check_float, store

CHANNEL_AXIS = 1

OLDEST_OPSET = 7
_TRAINING_MODE_OPSET = 14
_DEFAULT_EPS = float(np.float32(1e-5))  # attributes are float32, and so is the default that runtimes take
_ROLES = ("scale", "bias", "mean", "variance")


class BatchNormRule:
    """Merges a map into the batch norm beside it."""

    operators = frozenset({"BatchNormalization"})

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        """Take a map of the output. Raises Refusal."""
        own = read_affine(graph, graph.node(index))
        affine = demand.on(CHANNEL_AXIS, own.scale.size, where=label(graph.node(index)))
        weight, bias, _, _ = read_parameters(graph, graph.node(index))
        operands = {1: affine.scale * weight, 2: affine.scale * bias + affine.shift}
        return _edit(graph, index, operands, "weight' = scale weight; bias' = scale bias + shift")

    def check_forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Edit:
        """Take a map of the input. Raises Refusal."""
        own = read_affine(graph, graph.node(index))
        if slot != 0:
            raise Refusal(f"it is a parameter of {label(graph.node(index))}")
        affine = demand.on(CHANNEL_AXIS, own.scale.size, where=label(graph.node(index)))
        weight, _, mean, _ = read_parameters(graph, graph.node(index))
        if affine.scale.all():
            operands = {1: affine.scale * weight, 3: (mean - affine.shift) / affine.scale}
            return _edit(graph, index, operands, "weight' = scale weight; mean' = (mean - shift) / scale")
        both = own.after(affine)
        eps = read_eps(graph.node(index))
        operands = {
            1: both.scale * np.sqrt(1 + eps),
            2: both.shift,
            3: np.zeros_like(mean),
            4: np.ones_like(mean),
        }
        return _edit(graph, index, operands, "weight' = scale sqrt(1 + eps); bias' = shift; mean' = 0; var' = 1")


def read_affine(graph: Graph, norm: NodeProto) -> Affine:
    """The map of a batch norm in inference mode with constant parameters. Raises Refusal."""
    check_mode(graph, norm)
    weight, bias, mean, var = read_parameters(graph, norm)
    try:
        return affine_of(weight, bias, mean, var, eps=read_eps(norm))
    except StatisticsError as error:
        raise Refusal(f"its statistics are unusable: {error}") from None


def read_parameters(graph: Graph, norm: NodeProto) -> tuple[Exact, ...]:
    """Weight, bias, mean and variance, (C,) each, in float64. Raises Refusal."""
    vectors = []
    for name, role in zip(norm.input[1:], _ROLES, strict=True):
        try:
            vectors.append(graph.constant(name))
        except Refusal as refusal:
            raise Refusal(f"its {role} is not constant: {refusal}") from None
        check_float(vectors[-1], name)
    if any(vector.ndim != 1 or vector.shape != vectors[0].shape for vector in vectors):
        raise Refusal(f"its parameters are not vectors of one length: {[vector.shape for vector in vectors]}")
    return tuple(vector.astype(np.float64) for vector in vectors)


def read_eps(norm: NodeProto) -> float:
    return float(attributes_of(norm).get("epsilon", _DEFAULT_EPS))


def _edit(graph: Graph, index: int, operands: dict[int, Exact], formula: str) -> Edit:
    names = graph.node(index).input
    stored = {
        slot: store(vector, graph.constant(names[slot]).dtype, _ROLES[slot - 1], rows=vector.reshape(-1, 1))
        for slot, vector in operands.items()
    }
    return Edit(index, "merge", formula, stored)


def check_mode(graph: Graph, norm: NodeProto) -> None:
    """Refuse a batch norm that normalizes with anything but frozen statistics per channel. Raises Refusal."""
    attributes = attributes_of(norm)
    if graph.opset < OLDEST_OPSET:
        raise Refusal(
            f"opset {graph.opset} gives batch norm another form; convert the model to opset {OLDEST_OPSET} or later"
        )
    if attributes.get("training_mode", 0):
        raise Refusal("training_mode is 1: it normalizes with the statistics of each batch; export in eval mode")
    if graph.opset < _TRAINING_MODE_OPSET and len(norm.output) > 1:
        # Runtimes obey: onnxruntime normalizes with batch statistics as soon as these outputs are listed.
        raise Refusal(f"it lists {len(norm.output)} outputs, which below opset 14 means training mode")
    if any(norm.output[1:]):
        raise Refusal("it also gives running statistics")
    if not attributes.get("spatial", 1):
        raise Refusal("spatial is 0: its statistics differ by position, not by channel alone")


__all__ = ["CHANNEL_AXIS", "OLDEST_OPSET", "BatchNormRule", "read_affine", "read_eps", "read_parameters"]
