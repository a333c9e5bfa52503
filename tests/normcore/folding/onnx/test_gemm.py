from typing import Any

import numpy as np
import pytest

from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators, refusal


@pytest.mark.parametrize("shape", [None, (), (1,), (5,), (1, 5), (1, 1), (7, 1), (7, 5)], ids=str)
@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"transB": 1, "alpha": 0.5}, id="transB-alpha"),
        pytest.param({"transA": 1, "beta": -2.0}, id="transA-beta"),
        pytest.param({"transA": 1, "transB": 1, "alpha": -3.0, "beta": 0.25}, id="all"),
    ],
)
def test_folds_gemm(shape: tuple[int, ...] | None, attributes: dict[str, Any]) -> None:
    net = Net()
    weight = net.weight(5, 3) if attributes.get("transB") else net.weight(3, 5)
    inputs = ["x", weight] + ([] if shape is None else [net.weight(*shape)])
    given = (3, 7) if attributes.get("transA") else (7, 3)
    model = net.model({"x": given}, net.norm(net.op("Gemm", *inputs, **attributes), 5))
    folded, (entry,) = fold_and_compare(model, x=noise(*given))
    assert operators(folded) == ["Gemm"]
    assert entry.rule == "gemm"
    assert {attribute.name for attribute in folded.graph.node[0].attribute} <= {"transA", "transB"}


def test_folds_gemm_and_addition() -> None:
    net = Net()
    product = net.op("Gemm", "x", net.weight(3, 5), net.weight(5), beta=3.0)
    model = net.model({"x": ("N", 3)}, net.norm(net.op("Add", net.weight(5), product), 5))
    folded, _ = fold_and_compare(model, x=noise(7, 3))
    assert operators(folded) == ["Gemm"]


def test_refuses_square_constant_added_by_rows() -> None:
    net = Net()
    product = net.op("Gemm", "x", net.weight(3, 5))
    model = net.model({"x": (5, 3)}, net.norm(net.op("Add", product, net.weight(5, 1)), 5))
    assert "another axis" in refusal(model)


def test_refuses_computed_addend() -> None:
    net = Net()
    product = net.op("Gemm", "x", net.weight(3, 3), "x")
    assert "the C of Gemm 'gemm_0' is not constant" in refusal(net.model({"x": (5, 3)}, net.norm(product, 3)))


def test_refuses_constant_first_operand() -> None:
    net = Net()
    product = net.op("Gemm", net.weight(4, 5), "x")
    assert "the weight of Gemm 'gemm_0' is not constant" in refusal(net.model({"x": (5, 3)}, net.norm(product, 3)))


def test_folds_double_precision_exactly() -> None:
    net = Net(dtype=np.float64)
    model = net.model({"x": (7, 3)}, net.norm(net.op("Gemm", "x", net.weight(3, 5), net.weight(5)), 5))
    _, (entry,) = fold_and_compare(model, x=noise(7, 3).astype(np.float64), tolerance=1e-14)
    assert entry.residual == 0
