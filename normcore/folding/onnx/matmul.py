"""MatMul -> [Add] -> BatchNormalization, where the result has rank 2.

    scale (A B) + shift = A (scale B) + shift

MatMul puts its channels on the last axis and batch norm normalizes axis 1: they are the same axis only at rank 2.
At any other rank the fold is wrong even where the sizes agree, so the rank has to follow from the file. MatMul has no
bias; the result is a Gemm, which has.
"""

import numpy as np

from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.region import Region, Replacement, absorb, read_map, read_weight
from normcore.folding.onnx.rounding import store


class MatMulRule:
    """Scales columns and becomes a Gemm."""

    operator = "MatMul"
    name = "matmul"
    formula = "Gemm(A, scale B, shift)"

    def check(self, graph: Graph, region: Region) -> Replacement:
        """Compute what would be written; changes nothing. Raises Refusal."""
        node = graph.node(region.linear)
        if graph.is_constant(node.input[0]):
            raise Refusal(f"the constant of {label(node)} is its first operand: its rows do not make the channels")
        weight = read_weight(graph, region)
        shape = graph.shape(node.input[0])
        if shape is None:
            raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and {label(node)} folds at rank 2 only")
        if len(shape) != 2 or weight.ndim != 2:
            raise Refusal(
                f"{label(node)} multiplies a tensor of rank {len(shape)} with a weight of rank {weight.ndim}: its "
                "channels are on the last axis, batch norm normalizes axis 1, and these are the same only at rank 2"
            )
        affine = read_map(graph, region, channels=weight.shape[1], rank=2)
        exact = weight.astype(np.float64) * affine.scale
        return Replacement(
            weight=store(exact, weight.dtype, "weight", rows=exact.T),
            bias=store(affine.shift, weight.dtype, "bias"),
        )

    def rewrite(self, graph: Graph, region: Region, replacement: Replacement) -> None:
        graph.node(region.linear).op_type = "Gemm"
        absorb(graph, region, replacement)


__all__ = ["MatMulRule"]
