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

from normcore.folding.filters import Exact
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, read_operand, read_weight
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import store


class GemmRule:
    """Scales columns, or rows."""

    operators = frozenset({"Gemm"})

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        """Take a map of the output. Raises Refusal."""
        weight, columns, attributes = _read(graph, index)
        affine = demand.on(1, columns.shape[1], where=label(graph.node(index)))
        exact = float(attributes.get("alpha", 1.0)) * columns * affine.scale
        bias = _addend(graph, index, columns.shape[1], attributes) * affine.scale + affine.shift
        formula = "B'[:, n] = alpha scale[n] B[:, n]; C' = beta scale C + shift; alpha' = beta' = 1"
        return _edit(index, "gemm", formula, weight, exact, bias, attributes)

    def check_forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Edit:
        """Take a map of the first operand. Raises Refusal."""
        node = graph.node(index)
        if slot != 0:
            raise Refusal(f"it is {'the weight' if slot == 1 else 'an addend'} of {label(node)}")
        weight, columns, attributes = _read(graph, index)
        axis = 0 if attributes.get("transA", 0) else 1
        affine = demand.on(axis, columns.shape[0], where=label(node))
        alpha = float(attributes.get("alpha", 1.0))
        bias = _addend(graph, index, columns.shape[1], attributes) + alpha * (affine.shift @ columns)
        exact = alpha * affine.scale[:, None] * columns
        formula = "B'[k, :] = alpha scale[k] B[k, :]; C' = beta C + alpha shift B; alpha' = beta' = 1"
        return _edit(index, "gemm_input", formula, weight, exact, bias, attributes)


def _read(graph: Graph, index: int) -> tuple[NDArray[Any], Exact, dict[str, Any]]:
    """The stored weight, the same as (K, N) in float64, and the attributes. Raises Refusal."""
    weight = read_weight(graph, index)
    if weight.ndim != 2:
        raise Refusal(f"the weight of the Gemm has rank {weight.ndim} instead of 2")
    attributes = attributes_of(graph.node(index))
    columns = weight.T if attributes.get("transB", 0) else weight
    return weight, columns.astype(np.float64), attributes


def _addend(graph: Graph, index: int, columns: int, attributes: dict[str, Any]) -> Exact:
    """Its addend beta C, zeros of shape (N,) where there is no C. Raises Refusal."""
    addend = read_operand(graph, index, 2, "C")
    if addend is None:
        return np.zeros(columns)
    if addend.ndim > 2 or (addend.ndim and addend.shape[-1] not in (1, columns)):
        raise Refusal(f"C of the Gemm has shape {addend.shape} for {columns} columns")
    return np.asarray(float(attributes.get("beta", 1.0)) * addend.astype(np.float64))


def _edit(
    index: int, rule: str, formula: str, weight: NDArray[Any], exact: Exact, bias: Exact, attributes: dict[str, Any]
) -> Edit:
    stored = store(exact.T if attributes.get("transB", 0) else exact, weight.dtype, "weight", rows=exact.T)
    operands = {1: stored, 2: store(bias, weight.dtype, "bias")}
    return Edit(index, rule, formula, operands, resets=("alpha", "beta"))


__all__ = ["GemmRule"]
