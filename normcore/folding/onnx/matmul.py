"""MatMul takes the map of its last axis, and that of the axis it sums over.

    scale (A W) + shift = A (scale W) + shift        (A scale + shift) W = A (scale W) + shift W

MatMul puts its channels on the last axis and batch norm normalizes axis 1: they are the same axis only at rank 2, or
behind a Transpose or Reshape that moves them. At any other place the fold is wrong even where the sizes agree, so the
rank has to follow from the file. MatMul has no bias: at rank 2 it becomes a Gemm, which has one; elsewhere the Add
behind it takes the shift, or a new one.
"""

import numpy as np
from numpy.typing import NDArray

from normcore.folding.affine import Affine
from normcore.folding.filters import Exact, on_axis
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import read_weight
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import Stored, store, store_scaled


class MatMulRule:
    """Scales columns, or rows."""

    operators = frozenset({"MatMul"})

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        """Take a map of the output. Raises Refusal."""
        weight, rank = _read(graph, index)
        node = graph.node(index)
        try:
            affine = demand.on(rank - 1, weight.shape[1], where=label(node))
        except Refusal:
            if demand.axis == rank - 1:
                raise
            raise Refusal(
                f"{label(node)} multiplies a tensor of rank {rank} with a weight of rank 2: its channels are on the "
                f"last axis, those of the norm on axis {demand.axis}, and with batch norm these are the same only at "
                "rank 2"
            ) from None
        stored = store_scaled(weight, on_axis(affine.scale, 1, rank=2), weight.dtype, "weight", rows=np.transpose)
        return _edit(graph, index, stored, affine, rank=rank, rule="matmul", formula="W'[:, n] = scale[n] W[:, n]")

    def check_forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Edit:
        """Take a map of the first operand. Raises Refusal."""
        node = graph.node(index)
        if slot != 0:
            raise Refusal(f"it is the second operand of {label(node)}, whose rows make no channels")
        weight, rank = _read(graph, index)
        affine = demand.on(rank - 1, weight.shape[0], where=label(node))
        stored = store_scaled(weight, on_axis(affine.scale, 0, rank=2), weight.dtype, "weight", rows=np.transpose)
        response = Affine(np.ones(weight.shape[1]), affine.shift @ weight.astype(np.float64))
        formula = "W'[k, :] = scale[k] W[k, :]; b' = b + shift W"
        addition = _addition_behind(graph, index, weight.shape[1])
        if addition is not None and response.is_shifting and rank > 2:
            _check_range(graph, index, stored)
            add, slot, bias = addition
            follow = Edit(
                add, "add", "c' = c + shift W", {slot: store(bias + response.shift, stored.array.dtype, "bias")}
            )
            return Edit(index, "matmul_input", formula, {1: stored}, changes_output=True, follow=follow)
        return _edit(graph, index, stored, response, rank=rank, rule="matmul_input", formula=formula)


def _read(graph: Graph, index: int) -> tuple[NDArray[np.floating], int]:
    """The weight (K, N) and the rank of the first operand. Raises Refusal."""
    node = graph.node(index)
    if graph.is_constant(node.input[0]):
        raise Refusal(f"the constant of {label(node)} is its first operand: its rows do not make the channels")
    weight = read_weight(graph, index)
    rank = graph.rank(node.input[0])
    if rank is None:
        raise Refusal(f"the file leaves the rank of {node.input[0]!r} free, and so the axis that {label(node)} makes")
    if weight.ndim != 2 or rank < 2:
        raise Refusal(
            f"{label(node)} multiplies a tensor of rank {rank} with a weight of rank {weight.ndim}: its channels are "
            "no axis that it scales alone"
        )
    return weight, rank


def _edit(graph: Graph, index: int, weight: Stored, shift: Affine, *, rank: int, rule: str, formula: str) -> Edit:
    if rank == 2:
        bias = store(shift.shift, weight.array.dtype, "bias")
        gemm = f"Gemm(A, W', b'): {formula}"
        return Edit(index, rule, gemm, {1: weight, 2: bias}, operator="Gemm")
    if not shift.is_shifting:
        return Edit(index, rule, formula, {1: weight})
    _check_range(graph, index, weight)
    return Edit(
        index, rule, f"{formula}; Add(shift)", {1: weight}, addend=store(shift.shift, weight.array.dtype, "bias")
    )


def _check_range(graph: Graph, index: int, weight: Stored) -> None:
    if weight.array.dtype == np.float16:
        raise Refusal(f"the product of {label(graph.node(index))} before its bias could overflow in float16")


def _addition_behind(graph: Graph, index: int, columns: int) -> tuple[int, int, Exact] | None:
    """The Add that alone reads the product, the slot of its constant and that constant, (N,)."""
    output = graph.node(index).output[0]
    consumers = graph.consumers(output)
    if graph.is_output(output) or len(consumers) != 1:
        return None
    add, slot = consumers[0]
    if slot < 0 or graph.node(add).op_type != "Add" or graph.is_locked(add):
        return None
    try:
        constant = graph.constant(graph.node(add).input[1 - slot])
    except Refusal:
        return None
    return (add, 1 - slot, constant.astype(np.float64)) if constant.shape == (columns,) else None


__all__ = ["MatMulRule"]
