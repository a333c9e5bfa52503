"""BatchNormalization nodes: are they frozen, and which affine map do they apply."""

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from normcore.errors import StatisticsError
from normcore.folding.affine import Affine, affine_of
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.refusal import Refusal

CHANNEL_AXIS = 1

_OLDEST_OPSET = 7
_TRAINING_MODE_OPSET = 14
_DEFAULT_EPS = float(np.float32(1e-5))  # attributes are float32, and so is the default that runtimes take
_ROLES = ("scale", "bias", "mean", "variance")


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def read_affine(graph: Graph, norm: NodeProto) -> Affine:
    """The map of a batch norm in inference mode with constant parameters. Raises Refusal."""
    check_mode(graph, norm)
    vectors = []
    for name, role in zip(norm.input[1:], _ROLES, strict=True):
        try:
            vectors.append(graph.constant(name))
        except Refusal as refusal:
            raise Refusal(f"its {role} is not constant: {refusal}") from None
    if any(vector.ndim != 1 or vector.shape != vectors[0].shape for vector in vectors):
        raise Refusal(f"its parameters are not vectors of one length: {[vector.shape for vector in vectors]}")
    weight, bias, mean, var = vectors
    try:
        return affine_of(weight, bias, mean, var, eps=eps_of(norm))
    except StatisticsError as error:
        raise Refusal(f"its statistics are unusable: {error}") from None


def eps_of(norm: NodeProto) -> float:
    return float(attributes_of(norm).get("epsilon", _DEFAULT_EPS))


def check_mode(graph: Graph, norm: NodeProto) -> None:
    """Refuse a batch norm that normalizes with anything but frozen statistics per channel. Raises Refusal."""
    attributes = attributes_of(norm)
    if graph.opset < _OLDEST_OPSET:
        raise Refusal(
            f"opset {graph.opset} gives batch norm another form; convert the model to opset {_OLDEST_OPSET} or later"
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


__all__ = ["CHANNEL_AXIS", "attributes_of", "check_mode", "eps_of", "read_affine"]
