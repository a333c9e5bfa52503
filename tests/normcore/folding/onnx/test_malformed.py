"""Operands that onnx's checker lets pass and no runtime takes: each rule refuses them in words."""

from typing import Any

import numpy as np
import pytest
from onnx import helper

from normcore.folding.fold import fold_onnx
from tests.normcore.folding.builder import Net, refusal


@pytest.mark.parametrize(
    ("operator", "weight", "bias", "attributes", "reason"),
    [
        pytest.param("Conv", (4, 3), None, {}, "which is no filter", id="conv-rank"),
        pytest.param(
            "Conv", (4, 3, 1), (3,), {}, "bias of Conv 'conv_0' has shape (3,) for 4 channels", id="conv-bias"
        ),
        pytest.param("Conv", (5, 3, 1), None, {}, "normalizes 4 channels", id="conv-channels"),
        pytest.param("ConvTranspose", (3, 4), None, {}, "does not divide", id="transposed-rank"),
        pytest.param("ConvTranspose", (3, 2, 1), None, {"group": 2}, "into 2 groups", id="transposed-groups"),
        pytest.param("ConvTranspose", (3, 2, 1), None, {"group": 0}, "into 0 groups", id="no-groups"),
        pytest.param("Gemm", (3, 4, 1), None, {}, "rank 3 instead of 2", id="gemm-rank"),
        pytest.param("Gemm", (3, 4), (3,), {}, "C of the Gemm has shape (3,)", id="gemm-bias"),
        pytest.param("Gemm", (3, 4), (1, 1, 4), {}, "C of the Gemm has shape (1, 1, 4)", id="gemm-bias-rank"),
        pytest.param("MatMul", (3,), None, {}, "a weight of rank 1", id="matmul-vector"),
    ],
)
def test_refuses_operands_that_do_not_fit(
    operator: str, weight: tuple[int, ...], bias: tuple[int, ...] | None, attributes: dict[str, Any], reason: str
) -> None:
    net = Net()
    inputs = ["x", net.weight(*weight)] + ([] if bias is None else [net.weight(*bias)])
    shape = {"Gemm": (7, 3), "MatMul": (7, 4, 3)}.get(operator, (7, 3, 5))
    assert reason in refusal(net.model({"x": shape}, net.norm(net.op(operator, *inputs, **attributes), 4)))


def test_refuses_integer_weights() -> None:
    net = Net()
    weight = net.constant(np.ones((4, 3, 1), np.int32))
    assert "of datatype int32" in refusal(net.model({"x": (7, 3, 5)}, net.norm(net.op("Conv", "x", weight), 4)))


def test_refuses_weight_of_text() -> None:
    net = Net()
    weight = net.constant(np.array(["a"], object))
    assert "no numeric tensor" in refusal(net.model({"x": (7, 3, 5)}, net.norm(net.op("Conv", "x", weight), 4)))


def test_refuses_sparse_weight() -> None:
    net = Net()
    output = net.norm(net.op("Conv", "x", "sparse"), 4)
    net.constant(np.ones((4, 3, 1), np.float32), "sparse")
    model = net.model({"x": (7, 3, 5)}, output)
    values, indices = net.initializers["sparse"], helper.make_tensor("indices", 7, [1], [0])
    values.ClearField("dims")
    values.CopyFrom(helper.make_tensor("sparse", 1, [1], [2.0]))
    del model.graph.initializer[[tensor.name for tensor in model.graph.initializer].index("sparse")]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3, 1]))
    folded, (entry,) = fold_onnx(model)
    assert folded == model
    assert (entry.reason or "").startswith(
        "the weight of Conv 'conv_0' is not constant: 'sparse' is given by the caller; "
    )
