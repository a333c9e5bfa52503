"""Conv takes the map of its output channels, and that of its input channels where padding allows it.

    scale (W * x + b) + shift = (scale W) * x + (scale b + shift)
    W * (scale x + shift) + b = (W scale) * x + (b + sum of W shift)

W is (C_out, C_in / groups, k...). On the output side padding adds zeros to x in both forms. On the input side the
padded zeros would have to be `scale 0 + shift`: with a shift, only an unpadded convolution is the same.
"""

import numpy as np

from normcore.folding.filters import conv_response, on_axis, on_groups, rows_of
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, read_bias, read_weight
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal
from normcore.folding.onnx.rounding import store, store_scaled


class ConvRule:
    """Scales whole filters, or what they read."""

    operators = frozenset({"Conv"})

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        """Take a map of the output. Raises Refusal."""
        weight = read_weight(graph, index)
        if weight.ndim < 3:
            raise Refusal(f"the convolution's weight has shape {weight.shape}, which is no filter")
        channels = weight.shape[0]
        affine = demand.on(1, channels, where=label(graph.node(index)))
        factor = on_axis(affine.scale, 0, rank=weight.ndim)
        bias = affine.scale * read_bias(graph, index, channels=channels) + affine.shift
        operands = {
            1: store_scaled(weight, factor, weight.dtype, "weight", rows=rows_of),
            2: store(bias, weight.dtype, "bias"),
        }
        return Edit(index, "conv", "W'[o] = scale[o] W[o]; b' = scale b + shift", operands)

    def check_forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Edit:
        """Take a map of the input. Raises Refusal."""
        node = graph.node(index)
        if slot != 0:
            raise Refusal(f"it is the weight of {label(node)}")
        weight = read_weight(graph, index)
        groups = int(attributes_of(node).get("group", 1))
        if weight.ndim < 3 or groups < 1 or weight.shape[0] % groups:
            raise Refusal(f"the convolution's weight of shape {weight.shape} does not divide into {groups} groups")
        affine = demand.on(1, weight.shape[1] * groups, where=label(node))
        if affine.is_shifting and is_padded(graph, index):
            raise ShiftRefusal(f"{label(node)} pads with zeros, which the shift would have to reach too")
        factor = on_groups(affine.scale, weight.shape, groups=groups)
        operands = {1: store_scaled(weight, factor, weight.dtype, "weight", rows=rows_of)}
        if affine.is_shifting:
            response = conv_response(weight.astype(np.float64), affine.shift, groups=groups)
            bias = read_bias(graph, index, channels=len(weight)) + response
            operands[2] = store(bias, weight.dtype, "bias")
        return Edit(index, "conv_input", "W'[:, i] = scale[i] W[:, i]; b' = b + sum over i, k of W shift", operands)


def is_padded(graph: Graph, index: int) -> bool:
    """Whether zeros may be put around a convolution's input."""
    attributes = attributes_of(graph.node(index))
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return True  # a kernel of one tap needs none, and runtimes agree on that: not worth a case of its own
    return mode != "VALID" and any(attributes.get("pads", ()))


__all__ = ["ConvRule", "is_padded"]
