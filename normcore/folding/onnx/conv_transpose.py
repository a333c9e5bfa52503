"""ConvTranspose takes the map of its output channels, and the scale of its input channels.

W is (C_in, C_out / groups, k...), and output channel g * C_out / groups + j takes its filters from the input channels
of group g only. Seen as (groups, C_in / groups, C_out / groups, k...), the scale of that channel multiplies [g, :, j]:

    W'[g, :, j] = scale[g, j] W[g, :, j]        b' = scale b + shift
    W'[i] = scale[i] W[i]

A shift of the input reaches each output position by other taps; only a kernel of one tap sums it up evenly.
The number of groups comes from the node: a square weight fits several.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from normcore.folding.filters import on_axis, on_groups, point_response, transposed_rows
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, read_bias, read_weight
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal
from normcore.folding.onnx.rounding import store, store_scaled


class ConvTransposeRule:
    """Scales what each output channel takes from its group, or what each input channel gives."""

    operators = frozenset({"ConvTranspose"})

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        """Take a map of the output. Raises Refusal."""
        weight, groups = _read(graph, index)
        channels = groups * weight.shape[1]
        affine = demand.on(1, channels, where=label(graph.node(index)))
        factor = on_groups(affine.scale, weight.shape, groups=groups)
        bias = affine.scale * read_bias(graph, index, channels=channels) + affine.shift
        operands = {
            1: store_scaled(weight, factor, weight.dtype, "weight", rows=partial(transposed_rows, groups=groups)),
            2: store(bias, weight.dtype, "bias"),
        }
        return Edit(index, "conv_transpose", "W'[g, :, j] = scale[g, j] W[g, :, j]; b' = scale b + shift", operands)

    def check_forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Edit:
        """Take a map of the input. Raises Refusal."""
        node = graph.node(index)
        if slot != 0:
            raise Refusal(f"it is the weight of {label(node)}")
        weight, groups = _read(graph, index)
        affine = demand.on(1, weight.shape[0], where=label(node))
        if affine.is_shifting and not _is_pointwise(graph, index, weight):
            raise ShiftRefusal(f"{label(node)} spreads the shift unevenly over its output")
        factor = on_axis(affine.scale, 0, rank=weight.ndim)
        operands = {
            1: store_scaled(weight, factor, weight.dtype, "weight", rows=partial(transposed_rows, groups=groups))
        }
        if affine.is_shifting:
            response = point_response(weight.astype(np.float64), affine.shift, groups=groups)
            bias = read_bias(graph, index, channels=response.size) + response
            operands[2] = store(bias, weight.dtype, "bias")
        return Edit(index, "conv_transpose_input", "W'[i] = scale[i] W[i]; b' = b + sum over i of W shift", operands)


def _read(graph: Graph, index: int) -> tuple[NDArray[np.floating], int]:
    weight = read_weight(graph, index)
    groups = int(attributes_of(graph.node(index)).get("group", 1))
    if weight.ndim < 3 or groups < 1 or weight.shape[0] % groups:
        raise Refusal(f"the convolution's weight of shape {weight.shape} does not divide into {groups} groups")
    return weight, groups


def _is_pointwise(graph: Graph, index: int, weight: NDArray[np.floating]) -> bool:
    """One tap, and every output position has it."""
    attributes = attributes_of(graph.node(index))
    is_dense = all(stride == 1 for stride in attributes.get("strides", ()))
    is_bare = not any(attributes.get("pads", ())) and not any(attributes.get("output_padding", ()))
    is_free = "output_shape" not in attributes and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    return is_dense and is_bare and is_free and all(size == 1 for size in weight.shape[2:])


__all__ = ["ConvTransposeRule"]
