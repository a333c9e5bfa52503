"""Gemm takes the map of its columns, and that of its first operand's features.

    scale (alpha A B + beta C) + shift = A (alpha B scale) + (beta C scale + shift)
    alpha (A scale + shift) B + beta C = A (alpha scale B) + (beta C + alpha shift B)

The columns of B (rows where transB is set) are the output channels, on axis 1 of the rank-2 result. C keeps its
shape where that ends with the channels: a scalar becomes (N,), a column (M, 1) becomes (M, N). alpha and beta are
baked in and reset to 1.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from normcore.folding.filters import Exact, on_axis, rows_of
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, read_operand, read_weight
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import store, store_scaled


class GemmRule:
    """Scales columns, or rows."""

    operators = frozenset({"Gemm"})

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        """Take a map of the output. Raises Refusal."""
        weight, attributes = _read(graph, index)
        axis = 0 if attributes.get("transB", 0) else 1
        affine = demand.on(1, weight.shape[axis], where=label(graph.node(index)))
        factor = on_axis(float(attributes.get("alpha", 1.0)) * affine.scale, axis, rank=2)
        bias = _addend(graph, index, weight.shape[axis], attributes) * affine.scale + affine.shift
        formula = "B'[:, n] = alpha scale[n] B[:, n]; C' = beta scale C + shift; alpha' = beta' = 1"
        return _edit(index, "gemm", formula, weight, factor, bias, attributes)

    def check_forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Edit:
        """Take a map of the first operand. Raises Refusal."""
        node = graph.node(index)
        if slot != 0:
            raise Refusal(f"it is {'the weight' if slot == 1 else 'an addend'} of {label(node)}")
        weight, attributes = _read(graph, index)
        columns = (weight.T if attributes.get("transB", 0) else weight).astype(np.float64)
        axis = 0 if attributes.get("transA", 0) else 1
        affine = demand.on(axis, columns.shape[0], where=label(node))
        alpha = float(attributes.get("alpha", 1.0))
        bias = _addend(graph, index, columns.shape[1], attributes) + alpha * (affine.shift @ columns)
        factor = on_axis(alpha * affine.scale, 1 if attributes.get("transB", 0) else 0, rank=2)
        formula = "B'[k, :] = alpha scale[k] B[k, :]; C' = beta C + alpha shift B; alpha' = beta' = 1"
        return _edit(index, "gemm_input", formula, weight, factor, bias, attributes)


def _read(graph: Graph, index: int) -> tuple[NDArray[Any], dict[str, Any]]:
    """The stored weight and the attributes. Raises Refusal."""
    weight = read_weight(graph, index)
    if weight.ndim != 2:
        raise Refusal(f"the weight of the Gemm has rank {weight.ndim} instead of 2")
    return weight, attributes_of(graph.node(index))


def _addend(graph: Graph, index: int, columns: int, attributes: dict[str, Any]) -> Exact:
    """Its addend beta C, zeros of shape (N,) where there is no C. Raises Refusal."""
    addend = read_operand(graph, index, 2, "C")
    if addend is None:
        return np.zeros(columns)
    if addend.ndim > 2 or (addend.ndim and addend.shape[-1] not in (1, columns)):
        raise Refusal(f"C of the Gemm has shape {addend.shape} for {columns} columns")
    return np.asarray(float(attributes.get("beta", 1.0)) * addend.astype(np.float64))


def _edit(
    index: int, rule: str, formula: str, weight: NDArray[Any], factor: Exact, bias: Exact, attributes: dict[str, Any]
) -> Edit:
    rows = rows_of if attributes.get("transB", 0) else np.transpose
    stored = store_scaled(weight, factor, weight.dtype, "weight", rows=rows)
    operands = {1: stored, 2: store(bias, weight.dtype, "bias")}
    return Edit(index, rule, formula, operands, resets=("alpha", "beta"))


__all__ = ["GemmRule"]
