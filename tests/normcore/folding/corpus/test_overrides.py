"""Initializers that are graph inputs: a default, which any call may replace, decides nothing about the graph."""

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from normcore.folding.fold import fold_onnx
from tests.normcore.folding.builder import Net, difference, evaluate, noise, operators, reasons

SHAPE = (2, 3, 6)


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64), "choice")


def conv(net: Net) -> str:
    return net.op("Conv", "x", net.weight(4, 3, 1))


BACKWARD: dict[str, Callable[[Net], str]] = {
    "reshape": lambda net: net.op("Reshape", conv(net), ints(net, 2, 4, 6)),
    "scales": lambda net: net.op("Resize", conv(net), "", net.constant(np.array([1, 1, 2], np.float32), "choice")),
    "sizes": lambda net: net.op("Resize", conv(net), "", "", ints(net, 2, 4, 9)),
    "split": lambda net: net.op("Split", net.op("Conv", "x", net.weight(6, 3, 1)), ints(net, 4, 2), axis=1),
    "slice": lambda net: net.op("Slice", net.op("Conv", "x", net.weight(6, 3, 1)), ints(net, 2), "last", "one"),
    "pads": lambda net: net.op("Pad", conv(net), ints(net, 0, 0, 1, 0, 0, 1), mode="edge"),
    "squeeze": lambda net: net.op("Squeeze", net.op("Unsqueeze", conv(net), "one"), ints(net, 1)),
    "shape-of": lambda net: net.op("Reshape", conv(net), net.op("Shape", net.weight(2, 4, 6))),
}


def network(name: str) -> ModelProto:
    net = Net()
    net.constant(np.array([1], np.int64), "one")
    net.constant(np.array([6], np.int64), "last")
    output = net.norm(BACKWARD[name](net), 4)
    if name == "split":
        net.nodes[-2].output.append("rest")
    if name == "shape-of":
        shape = next(node.input[0] for node in net.nodes if node.op_type == "Shape")
        net.initializers["choice"] = net.initializers.pop(shape)
        net.initializers["choice"].name = "choice"
        next(node for node in net.nodes if node.op_type == "Shape").input[0] = "choice"
    model = net.model({"x": SHAPE}, output, overridable=["choice"])
    for dim in model.graph.input[-1].type.tensor_type.shape.dim:
        if name == "shape-of":
            dim.dim_param = "free"
    for axis, dim in enumerate(model.graph.output[0].type.tensor_type.shape.dim):
        dim.dim_param = f"axis{axis}"
    return model


@pytest.mark.parametrize("name", BACKWARD)
def test_a_default_decides_no_shape(name: str) -> None:
    expected = "splits or merges the axis" if name == "shape-of" else "the option freeze_initializers"
    assert expected in reasons(network(name))[0]


@pytest.mark.parametrize("name", BACKWARD)
def test_a_default_decides_where_it_cannot_be_replaced(name: str) -> None:
    model = network(name)
    folded, (entry,) = fold_onnx(model, freeze_initializers=True)
    assert entry.status == "folded"
    assert difference(evaluate(folded, x=noise(*SHAPE))[0], evaluate(model, x=noise(*SHAPE))[0]) < 3e-6


def test_another_shape_makes_other_channels() -> None:
    """Why: (2, 4, 6) read as (3, 4, 4) has other channels on axis 1, and the norm is right for both."""
    model = network("reshape")
    folded, _ = fold_onnx(model, freeze_initializers=True)
    folded.graph.input.append(model.graph.input[-1])
    assert "BatchNormalization" not in operators(folded)
    feeds = {"x": noise(*SHAPE), "choice": np.array([3, 4, 4])}
    assert difference(evaluate(folded, **feeds)[0], evaluate(model, **feeds)[0]) > 0.1
