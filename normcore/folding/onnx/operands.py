"""Constant operands of linear operators, read for a rule."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from normcore.folding.filters import Exact
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import check_float, largest_of


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def check_given(graph: Graph, index: int) -> None:
    """Refuse a node's parameters that each call may choose, with the option that fixes them. Raises Refusal."""
    for name in graph.node(index).input[1:]:
        if name and graph.producer(name) is None:
            graph.constant(name)


def is_narrow(graph: Graph, name: str) -> bool:
    """Whether a tensor is of float16, or may be: its range ends where other datatypes have room."""
    dtype = graph.dtype(name)
    return dtype is None or dtype == np.float16  # `in` would take float64 for None, which is numpy's default datatype


def read_operand(graph: Graph, index: int, slot: int, role: str) -> NDArray[Any] | None:
    """A constant floating point input of a node; None where it has none. Raises Refusal."""
    node = graph.node(index)
    if len(node.input) <= slot or not node.input[slot]:
        return None
    try:
        value = graph.constant(node.input[slot])
    except Refusal as refusal:
        raise Refusal(f"the {role} of {label(node)} is not constant: {refusal}") from None
    check_float(value, node.input[slot])
    return value


def read_weight(graph: Graph, index: int) -> NDArray[Any]:
    """The weight, second input of every linear operator. Raises Refusal."""
    weight = read_operand(graph, index, 1, "weight")
    if weight is None:
        raise Refusal(f"{label(graph.node(index))} has no weight")
    if not weight.size:
        raise Refusal(f"the weight of {label(graph.node(index))} is empty")
    if not np.isfinite(largest_of(weight)):
        raise Refusal(f"the weight of {label(graph.node(index))} holds NaN or infinity")
    return weight


def read_bias(graph: Graph, index: int, *, channels: int) -> Exact:
    """A convolution's bias, (C,), in float64; zeros where it has none. Raises Refusal."""
    bias = read_operand(graph, index, 2, "bias")
    if bias is None:
        return np.zeros(channels, np.float64)
    if bias.shape != (channels,):
        raise Refusal(f"the bias of {label(graph.node(index))} has shape {bias.shape} for {channels} channels")
    return bias.astype(np.float64)


__all__ = ["attributes_of", "check_given", "is_narrow", "read_bias", "read_operand", "read_weight"]
