"""Norms that go into one another, and those with nowhere to go."""

import numpy as np
import pytest

from normcore.folding.fold import fold_onnx
from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators

C = 6
X = noise(2, C, 10, 8)


def test_merges_norms() -> None:
    net = Net()
    model = net.model({"x": X.shape}, net.op("Tanh", net.norm(net.norm(net.norm("x", C), C), C)))
    folded, entries = fold_and_compare(model, x=X, tolerance=1e-5)
    assert operators(folded) == ["BatchNormalization", "Tanh"]
    assert [entry.status for entry in entries] == ["kept", "folded", "folded"]
    assert {entry.direction for entry in entries[1:]} == {"merge"}


def test_merges_scale_layer_behind() -> None:
    net = Net()
    scaled = net.op("Add", net.op("Mul", net.norm("x", C), net.weight(C, 1, 1)), net.weight(C, 1, 1))
    folded, _ = fold_and_compare(net.model({"x": X.shape}, net.op("Relu", scaled)), x=X)
    assert operators(folded) == ["BatchNormalization", "Relu"]


@pytest.mark.parametrize("has_dead_channel", [False, True])
def test_merges_scale_layer_before(has_dead_channel: bool) -> None:
    net = Net()
    factor = noise(C, 1, 1)
    factor[2] *= not has_dead_channel
    scaled = net.op("Add", net.op("Mul", "x", net.constant(factor)), net.weight(C, 1, 1))
    folded, _ = fold_and_compare(net.model({"x": X.shape}, net.op("Relu", net.norm(scaled, C))), x=X)
    assert operators(folded) == ["BatchNormalization", "Relu"]


def test_does_not_merge_through_what_others_see() -> None:
    net = Net()
    first = net.norm("x", C)
    model = net.model({"x": X.shape}, net.op("Add", net.norm(first, C), net.op("Tanh", first)))
    assert fold_onnx(model)[0] == model


def test_merges_then_folds_forward() -> None:
    net = Net()
    model = net.model({"x": X.shape}, net.op("Conv", net.norm(net.norm("x", C), C), net.weight(4, C, 3, 3)))
    folded, entries = fold_and_compare(model, x=X)
    assert operators(folded) == ["Conv"]
    assert [entry.status for entry in entries] == ["folded", "folded"]


def test_makes_affine_on_request() -> None:
    net = Net()
    model = net.model({"x": X.shape}, net.op("Tanh", net.norm("x", C, output="normed")))
    assert operators(fold_onnx(model)[0]) == ["BatchNormalization", "Tanh"]
    folded, (entry,) = fold_and_compare(model, options={"affine": True}, x=X)
    assert operators(folded) == ["Mul", "Add", "Tanh"]
    assert list(folded.graph.node[1].output) == ["normed"]
    assert (entry.status, entry.direction, entry.option) == ("folded", "in place", "affine")


def test_affine_option_refuses_training_mode() -> None:
    net = Net()
    normed = net.norm("x", C, training_mode=1)
    net.nodes[-1].output.extend(["mean", "var"])
    model = net.model({"x": X.shape}, normed)
    folded, (entry,) = fold_onnx(model, affine=True)
    assert folded == model
    assert "training_mode is 1" in (entry.reason or "")


def test_affine_option_needs_a_rank() -> None:
    net = Net()
    model = net.model({"x": (2, C, "w")}, net.norm(net.op("Squeeze", "x"), C))
    assert "leaves the rank" in (fold_onnx(model, affine=True)[1][0].reason or "")


@pytest.mark.parametrize("weight", [0.5, 2])
def test_affine_option_multiplies_nothing_up_in_float16(weight: float) -> None:
    """4e4 * 2 - 7e4 is small, and 4e4 * 2 is infinite: what a batch norm computes at once is two operators then."""
    for dtype in (np.float16, np.float32):
        net = Net(dtype=dtype)
        vectors = [net.constant(np.full(C, value, dtype)) for value in (weight, 0, 3e4, 1)]
        model = net.model({"x": X.shape}, net.op("BatchNormalization", "x", *vectors))
        folded, (entry,) = fold_onnx(model, affine=True)
        if dtype == np.float16 and weight > 1:
            assert "float16" in (entry.reason or "")
            assert folded == model
        else:
            assert operators(folded) == ["Mul", "Add"]


def test_merges_into_float16_norm_without_overflow() -> None:
    net = Net(dtype=np.float16)
    big = net.constant(np.full(C, 6e4, np.float16))
    zeros, ones = net.constant(np.zeros(C, np.float16)), net.constant(np.ones(C, np.float16))
    first = net.op("BatchNormalization", "x", big, zeros, zeros, ones)
    model = net.model(
        {"x": X.shape}, net.op("BatchNormalization", first, net.constant(np.full(C, 2, np.float16)), zeros, zeros, ones)
    )
    folded, entries = fold_onnx(model)
    assert folded == model
    assert "more than float16 can hold" in (entries[1].reason or "")


def test_row_that_another_fold_makes_is_judged_too() -> None:
    """The norm leaves its offset behind the factor: together they are a row, which nothing has looked at before."""
    net = Net()
    factor = np.linspace(0, 2, C, dtype=np.float32).reshape(C, 1, 1)
    normed = net.norm(net.op("Mul", "x", net.constant(factor)), C)
    model = net.model({"x": X.shape}, net.op("Conv", normed, net.weight(4, C, 3, 3), pads=[1, 1, 1, 1]))
    folded, entries = fold_and_compare(model, x=X)
    assert operators(folded) == ["Mul", "Add", "Conv"]
    assert [entry.status for entry in entries] == ["kept", "folded"]
    assert "which is 0 in channel 0" in (entries[0].reason or "")
