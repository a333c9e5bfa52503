"""Gemm -> [Add] -> BatchNormalization.

    scale (alpha A B + beta C) + shift = A (alpha B scale) + (beta C scale + shift)

The columns of B (rows where transB is set) are the output channels, on axis 1 of the rank-2 result. C keeps its
shape where that ends with the channels: a scalar becomes (N,), a column (M, 1) becomes (M, N). alpha and beta are
baked in and reset to 1.
"""

import numpy as np
from onnx import NodeProto

from normcore.folding.onnx.batch_norm import attributes_of
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.region import Region, Replacement, absorb, read_map, read_operand, read_weight
from normcore.folding.onnx.rounding import store


class GemmRule:
    """Scales columns."""

    operator = "Gemm"
    name = "gemm"
    formula = "B'[:, n] = alpha scale[n] B[:, n]; C' = beta scale C + shift; alpha' = beta' = 1"

    def check(self, graph: Graph, region: Region) -> Replacement:
        """Compute what would be written; changes nothing. Raises Refusal."""
        weight = read_weight(graph, region)
        if weight.ndim != 2:
            raise Refusal(f"the weight of the Gemm has rank {weight.ndim} instead of 2")
        attributes = attributes_of(graph.node(region.linear))
        columns = (weight.T if attributes.get("transB", 0) else weight).astype(np.float64)
        affine = read_map(graph, region, channels=columns.shape[1], rank=2)
        exact = float(attributes.get("alpha", 1.0)) * columns * affine.scale
        bias = np.broadcast_to(affine.shift, (columns.shape[1],))
        addend = read_operand(graph, region, 2, "C")
        if addend is not None:
            if addend.ndim > 2 or (addend.ndim and addend.shape[-1] not in (1, columns.shape[1])):
                raise Refusal(f"C of the Gemm has shape {addend.shape} for {columns.shape[1]} columns")
            bias = float(attributes.get("beta", 1.0)) * addend.astype(np.float64) * affine.scale + bias
        return Replacement(
            weight=store(exact.T if attributes.get("transB", 0) else exact, weight.dtype, "weight", rows=exact.T),
            bias=store(bias, weight.dtype, "bias"),
        )

    def rewrite(self, graph: Graph, region: Region, replacement: Replacement) -> None:
        absorb(graph, region, replacement)
        reset_attributes(graph.node(region.linear))


def reset_attributes(gemm: NodeProto) -> None:
    """Leave alpha and beta at their default of 1."""
    kept = [attribute for attribute in gemm.attribute if attribute.name not in ("alpha", "beta")]
    copies = [type(attribute).FromString(attribute.SerializeToString()) for attribute in kept]
    del gemm.attribute[:]
    gemm.attribute.extend(copies)


__all__ = ["GemmRule"]
