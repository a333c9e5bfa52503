import numpy as np
import pytest
from onnx import helper

from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators, refusal


@pytest.mark.parametrize("shape", [None, (5,), (1, 5), (1,), ()], ids=str)
def test_folds_product_into_gemm(shape: tuple[int, ...] | None) -> None:
    net = Net()
    product = net.op("MatMul", "x", net.weight(3, 5))
    added = product if shape is None else net.op("Add", product, net.weight(*shape))
    folded, (entry,) = fold_and_compare(net.model({"x": ("N", 3)}, net.norm(added, 5)), x=noise(7, 3))
    assert operators(folded) == ["Gemm"]
    assert (entry.rule, entry.into) == ("matmul", "matmul_0")


def test_folds_where_reshape_makes_rank_two() -> None:
    net = Net()
    flat = net.op("Flatten", "x")
    model = net.model({"x": ("N", 3, 2)}, net.norm(net.op("MatMul", flat, net.weight(6, 5)), 5))
    folded, _ = fold_and_compare(model, x=noise(7, 3, 2))
    assert operators(folded) == ["Flatten", "Gemm"]


@pytest.mark.parametrize("size", [5, 4], ids=["coincident-sizes", "distinct-sizes"])
def test_refuses_rank_three(size: int) -> None:
    """(N, C, L) with L == C: the shapes agree, the axes do not."""
    net = Net()
    product = net.op("MatMul", "x", net.weight(3, 5))
    assert "the same only at rank 2" in refusal(net.model({"x": (5, size, 3)}, net.norm(product, size)))


def test_refuses_unknown_rank() -> None:
    net = Net()
    product = net.op("MatMul", net.op("Squeeze", "x"), net.weight(3, 5))
    assert "leaves the rank of 't1' free" in refusal(net.model({"x": ("N", 3, "L")}, net.norm(product, 5)))


def test_does_not_believe_claimed_shapes() -> None:
    """A value_info may lie: onnxruntime does not hold a graph to it."""
    net = Net()
    product = net.op("MatMul", net.op("Squeeze", "x"), net.weight(3, 5))
    model = net.model({"x": ("N", 3, "L")}, net.norm(product, 5))
    model.graph.value_info.append(helper.make_tensor_value_info("t1", 1, (7, 3)))
    assert "leaves the rank of 't1' free" in refusal(model)


def test_refuses_constant_first_operand() -> None:
    net = Net()
    product = net.op("MatMul", net.weight(5, 5), "x")
    assert "is its first operand" in refusal(net.model({"x": (5, 5)}, net.norm(product, 5)))


def test_follows_transposed_weight() -> None:
    net = Net()
    product = net.op("MatMul", "x", net.op("Transpose", net.weight(5, 3), perm=[1, 0]))
    folded, _ = fold_and_compare(net.model({"x": (7, 3)}, net.norm(product, 5)), x=noise(7, 3))
    assert operators(folded) == ["Gemm"]
    assert len(folded.graph.initializer) == 2


def test_refuses_integer_weight() -> None:
    net = Net()
    product = net.op("MatMul", net.op("Cast", "x", to=6), net.constant(np.ones((3, 5), np.int32)))
    model = net.model({"x": (7, 3)}, net.norm(net.op("Cast", product, to=1), 5))
    assert "turns int32 into float32" in refusal(model)
