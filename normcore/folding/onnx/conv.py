"""Conv -> [Add] -> BatchNormalization, of any rank, grouped or not.

    scale (W * x + b) + shift = (scale W) * x + (scale b + shift)

W is (C_out, C_in / groups, k...): output channels lie on axis 0 whatever the groups, and padding adds zeros to x, so
it is the same on both sides.
"""

import numpy as np

from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.region import Region, Replacement, absorb, read_bias, read_map, read_weight
from normcore.folding.onnx.rounding import store


class ConvRule:
    """Scales whole filters."""

    operator = "Conv"
    name = "conv"
    formula = "W'[o] = scale[o] W[o]; b' = scale b + shift"

    def check(self, graph: Graph, region: Region) -> Replacement:
        """Compute what would be written; changes nothing. Raises Refusal."""
        weight = read_weight(graph, region)
        if weight.ndim < 3:
            raise Refusal(f"the convolution's weight has shape {weight.shape}, which is no filter")
        channels = weight.shape[0]
        affine = read_map(graph, region, channels=channels, rank=weight.ndim)
        exact = weight.astype(np.float64) * affine.scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = affine.scale * read_bias(graph, region, channels=channels) + affine.shift
        return Replacement(
            weight=store(exact, weight.dtype, "weight", rows=exact.reshape(channels, -1)),
            bias=store(bias, weight.dtype, "bias"),
        )

    def rewrite(self, graph: Graph, region: Region, replacement: Replacement) -> None:
        absorb(graph, region, replacement)


__all__ = ["ConvRule"]
