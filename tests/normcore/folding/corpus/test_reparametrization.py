"""Weights that the graph normalizes itself, and gains of norms that stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from normcore.folding.fold import fold_onnx
from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators

C = 6
X = noise(2, 3, 10, 8)


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def weight_norm(net: Net) -> str:
    """The weight g v / ||v|| over all axes but the first."""
    direction, gain = net.weight(C, 3, 3, 3), net.weight(C, 1, 1, 1)
    return net.op("Mul", direction, net.op("Div", gain, net.op("ReduceL2", direction, axes=[1, 2, 3])))


def spectral_norm(net: Net) -> str:
    """W / (u W v) with the stored vectors."""
    weight = net.weight(C, 3, 3, 3)
    matrix = net.op("Reshape", weight, ints(net, C, -1))
    product = net.op("MatMul", matrix, net.weight(27, 1))
    return net.op("Div", weight, net.op("ReduceSum", net.op("Mul", net.weight(C, 1), product), keepdims=0))


def standardized(net: Net) -> str:
    weight = net.weight(C, 3, 3, 3)
    centred = net.op("Sub", weight, net.op("ReduceMean", weight, axes=[1, 2, 3]))
    var = net.op("ReduceMean", net.op("Mul", centred, centred), axes=[1, 2, 3])
    return net.op("Div", centred, net.op("Sqrt", net.op("Add", var, net.constant(np.float32(1e-6)))))


def standardized_by_batch_norm(net: Net) -> str:
    """How timm's StdConv2d is exported: batch norm in training mode over a view of the weight."""
    view = net.op("Reshape", net.weight(C, 3, 3, 3), ints(net, 1, C, -1))
    parameters = [net.constant(np.full(C, value, np.float32)) for value in (1, 0, 0, 1)]
    normed = net.op("BatchNormalization", view, *parameters, training_mode=1, epsilon=1e-6)
    net.nodes[-1].output.extend(["unused_mean", "unused_var"])
    return net.op("Reshape", normed, ints(net, C, 3, 3, 3))


WEIGHTS: dict[str, Callable[[Net], str]] = {
    "weight-norm": weight_norm,
    "spectral-norm": spectral_norm,
    "weight-standardization": standardized,
    "weight-standardization-by-batch-norm": standardized_by_batch_norm,
}


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_bakes(name: str, has_norm: bool) -> None:
    net = Net()
    convolved = net.op("Conv", "x", WEIGHTS[name](net))
    model = net.model({"x": X.shape}, net.norm(convolved, C) if has_norm else convolved)
    folded, entries = fold_and_compare(model, x=X)
    assert operators(folded) == ["Conv"]
    assert {entry.status for entry in entries} == {"folded"}
    assert "bake" in {entry.rule for entry in entries}


def test_bakes_weight_that_two_convolutions_share_once() -> None:
    net = Net()
    weight = weight_norm(net)
    parts = [net.op("Conv", net.op(operator, "x"), weight) for operator in ("Abs", "Neg")]
    folded, _ = fold_and_compare(net.model({"x": X.shape}, net.op("Mul", *parts)), x=X)
    assert operators(folded) == ["Abs", "Conv", "Neg", "Conv", "Mul"]
    assert len(folded.graph.initializer) == 1


def test_does_not_bake_what_a_run_decides() -> None:
    net = Net()
    weight = net.weight(C, 3, 3, 3)
    model = net.model({"x": X.shape}, net.op("Conv", "x", net.op("Mul", weight, net.op("ReduceMax", "x", keepdims=0))))
    folded, entries = fold_onnx(model)
    assert folded == model
    assert all(entry.status == "kept" for entry in entries)


def test_does_not_bake_overridable_weight() -> None:
    net = Net()
    model = net.model({"x": X.shape}, net.op("Conv", "x", weight_norm(net)), overridable=["w1"])
    assert fold_onnx(model)[0] == model
    assert operators(fold_onnx(model, freeze_initializers=True)[0]) == ["Conv"]


def test_leaves_computed_weights_that_are_no_normalization() -> None:
    net = Net()
    model = net.model({"x": X.shape}, net.op("Conv", "x", net.op("Identity", net.weight(C, 3, 3, 3))))
    assert fold_onnx(model)[0] == model


def transformer(operator: str, *, bias: bool = True, reads: str = "linear") -> tuple[ModelProto, Any]:
    """A norm over the last axis, read by two linears."""
    net = Net(opset=23)
    operands = [net.weight(C)] + ([net.weight(C)] if bias else [])
    normed = net.op(operator, "x", *operands, axis=-1)
    query = net.op("Add", net.op("MatMul", normed, net.weight(C, 5)), net.weight(5))
    key = net.op("Add", net.weight(5), net.op("MatMul", normed, net.weight(C, 5)))
    output = net.op("Mul", query, key)
    if reads == "residual":
        output = net.op("Add", output, net.op("MatMul", net.op("Tanh", normed), net.weight(C, 5)))
    return net.model({"x": (2, 7, C)}, output), noise(2, 7, C)


@pytest.mark.parametrize("operator", ["LayerNormalization", "RMSNormalization"])
def test_moves_gain_into_all_linears_on_request(operator: str) -> None:
    model, x = transformer(operator, bias=operator == "LayerNormalization")
    assert fold_onnx(model)[0] == model
    folded, (entry,) = fold_onnx(model, move_gains=True)
    assert operators(folded) == operators(model)
    assert (entry.status, entry.option) == ("folded", "move_gains")
    if operator == "LayerNormalization":
        fold_and_compare(model, options={"move_gains": True}, x=x)
    gains = [tensor for tensor in folded.graph.initializer if tensor.name == folded.graph.node[0].input[1]]
    assert np.frombuffer(gains[0].raw_data, np.float32).tolist() == [1.0] * C
    assert operators(fold_onnx(folded, move_gains=True)[0]) == operators(folded)


def test_keeps_gain_that_others_read() -> None:
    model, _ = transformer("LayerNormalization", reads="residual")
    folded, (entry,) = fold_onnx(model, move_gains=True)
    assert folded == model
    assert "Tanh" in (entry.reason or "")


def test_moves_decomposed_gain_by_itself() -> None:
    """In x / rms(x) * gain -> linear: the Mul is a scale per channel like any other."""
    net = Net()
    mean_square = net.op("ReduceMean", net.op("Mul", "x", "x"), axes=[-1])
    root = net.op("Sqrt", net.op("Add", mean_square, net.constant(np.float32(1e-6))))
    gained = net.op("Mul", net.weight(C), net.op("Div", "x", root))
    model = net.model({"x": (2, 7, C)}, net.op("MatMul", gained, net.weight(C, 5)))
    folded, _ = fold_and_compare(model, x=noise(2, 7, C))
    assert operators(folded) == ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "MatMul"]


def test_moves_gain_of_instance_norm_into_convolution() -> None:
    net = Net()
    normed = net.op("InstanceNormalization", "x", net.weight(3), net.weight(3))
    model = net.model({"x": X.shape}, net.op("Conv", normed, net.weight(C, 3, 3, 3)))
    folded, (entry,) = fold_and_compare(model, options={"move_gains": True}, x=X)
    assert entry.status == "folded"
    assert operators(folded) == ["InstanceNormalization", "Conv"]


def test_keeps_gain_over_several_axes() -> None:
    net = Net()
    normed = net.op("LayerNormalization", "x", net.weight(10, 8), axis=2)
    model = net.model({"x": X.shape}, net.op("Conv", normed, net.weight(C, 3, 3, 3)))
    folded, (entry,) = fold_onnx(model, move_gains=True)
    assert folded == model
    assert "is no vector over one axis" in (entry.reason or "")


def trained(net: Net, *shape: int) -> str:
    """A batch norm over a constant that also gives its statistics, the second output named `mean`."""
    normed = net.norm(net.weight(*shape), shape[1])
    net.nodes[-1].output.extend(["mean", "var"])
    return normed


def test_does_not_bake_training_mode_of_old_opsets_with_stored_statistics() -> None:
    """Below opset 14 it is the list of outputs that asks for training mode; no attribute says so."""
    net = Net(opset=13)
    normed = trained(net, C, 3, 1, 1)
    net.nodes[-1].output.extend(["saved_mean", "saved_var"])
    model = net.model({"x": X.shape}, net.op("Conv", "x", normed))
    folded, entries = fold_onnx(model)
    assert folded == model
    assert {entry.status for entry in entries} == {"kept"}


def test_does_not_bake_a_weight_whose_node_gives_more() -> None:
    net = Net()
    normed = trained(net, C, 3, 1, 1)
    net.nodes[-1].attribute.extend([onnx.helper.make_attribute("training_mode", 1)])
    output = net.op("Add", net.op("Conv", "x", normed), net.op("ReduceSum", "mean", keepdims=0))
    model = net.model({"x": X.shape}, output)
    assert fold_onnx(model)[0] == model
