"""ConvTranspose -> [Add] -> BatchNormalization, of any rank, grouped or not.

W is (C_in, C_out / groups, k...), and output channel g * C_out / groups + j takes its filters from the input channels
of group g only. Seen as (groups, C_in / groups, C_out / groups, k...), the scale of that channel multiplies [g, :, j]:

    W'[g, :, j] = scale[g, j] W[g, :, j]        b' = scale b + shift

The number of groups comes from the node: a square weight fits several.
"""

import numpy as np

from normcore.folding.onnx.batch_norm import attributes_of
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.region import Region, Replacement, absorb, read_bias, read_map, read_weight
from normcore.folding.onnx.rounding import store


class ConvTransposeRule:
    """Scales what each output channel takes from its group."""

    operator = "ConvTranspose"
    name = "conv_transpose"
    formula = "W'[g, :, j] = scale[g, j] W[g, :, j]; b' = scale b + shift"

    def check(self, graph: Graph, region: Region) -> Replacement:
        """Compute what would be written; changes nothing. Raises Refusal."""
        weight = read_weight(graph, region)
        groups = int(attributes_of(graph.node(region.linear)).get("group", 1))
        if weight.ndim < 3 or groups < 1 or weight.shape[0] % groups:
            raise Refusal(f"the convolution's weight of shape {weight.shape} does not divide into {groups} groups")
        per_group = weight.shape[1]
        channels = groups * per_group
        affine = read_map(graph, region, channels=channels, rank=weight.ndim)
        grouped = weight.astype(np.float64).reshape(groups, -1, per_group, *weight.shape[2:])
        exact = grouped * affine.scale.reshape(groups, 1, per_group, *[1] * (weight.ndim - 2))
        bias = affine.scale * read_bias(graph, region, channels=channels) + affine.shift
        return Replacement(
            weight=store(
                exact.reshape(weight.shape),
                weight.dtype,
                "weight",
                rows=np.moveaxis(exact, 2, 1).reshape(channels, -1),
            ),
            bias=store(bias, weight.dtype, "bias"),
        )

    def rewrite(self, graph: Graph, region: Region, replacement: Replacement) -> None:
        absorb(graph, region, replacement)


__all__ = ["ConvTransposeRule"]
