from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators, refusal


@pytest.mark.parametrize(
    ("spatial", "channels", "attributes"),
    [
        pytest.param((11,), (3, 5), {}, id="1d"),
        pytest.param((11, 9), (3, 5), {"pads": [1, 2, 0, 1], "strides": [2, 1]}, id="2d-uneven-pads"),
        pytest.param((7, 6, 5), (3, 4), {"auto_pad": "SAME_UPPER"}, id="3d-auto-pad"),
        pytest.param((9, 9), (6, 4), {"group": 2}, id="grouped"),
        pytest.param((9, 9), (4, 4), {"group": 4}, id="depthwise"),
        pytest.param((9, 9), (3, 6), {"group": 3, "dilations": [2, 2]}, id="depthwise-multiplier"),
        pytest.param((5, 5), (5, 5), {}, id="all-sizes-coincide"),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_folds_convolution(
    spatial: tuple[int, ...], channels: tuple[int, int], attributes: dict[str, Any], has_bias: bool
) -> None:
    net = Net()
    given, made = channels
    inputs = ["x", net.weight(made, given // attributes.get("group", 1), *[3] * len(spatial))]
    if has_bias:
        inputs.append(net.weight(made))
    output = net.norm(net.op("Conv", *inputs, **attributes), made, epsilon=1e-3)
    model = net.model({"x": (5, given, *spatial)}, output)
    folded, (entry,) = fold_and_compare(model, x=noise(5, given, *spatial))
    assert operators(folded) == ["Conv"]
    assert (entry.status, entry.rule, entry.into, entry.output) == ("folded", "conv", "conv_0", output)
    assert entry.num_features == made
    assert entry.pattern == "Conv -> BatchNormalization"
    assert entry.residual is not None
    assert 0 < entry.residual < 2.0**-23


def with_add(shape: tuple[int, ...], *, swapped: bool = False) -> ModelProto:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(7, 3, 3, 3), pads=[1, 1, 1, 1])
    operands = (convolved, net.weight(*shape))
    added = net.op("Add", *(reversed(operands) if swapped else operands))
    return net.model({"x": (2, 3, 7, 7)}, net.norm(added, 7))


@pytest.mark.parametrize("shape", [(1, 7, 1, 1), (7, 1, 1), (1, 1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("swapped", [True, False])
def test_folds_addition_of_a_constant_per_channel(shape: tuple[int, ...], swapped: bool) -> None:
    folded, (entry,) = fold_and_compare(with_add(shape, swapped=swapped), x=noise(2, 3, 7, 7))
    assert operators(folded) == ["Conv"]
    assert entry.pattern == "Conv -> Add -> BatchNormalization"


@pytest.mark.parametrize(
    "shape", [(7,), (7, 1), (1, 1, 7), (7, 7, 7), (1, 1, 7, 1, 1), (1, 7, 1, 1, 1), (2, 7, 1, 1)], ids=str
)
def test_refuses_addition_over_another_axis(shape: tuple[int, ...]) -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(7, 3, 3, 3), pads=[1, 1, 1, 1])
    model = net.model({"x": (2, 3, 7, 7)}, net.norm(net.op("Add", convolved, net.weight(*shape)), 7))
    assert any(part in refusal(model) for part in ("another axis than the channels", "rank of 't2' free"))


def test_refuses_addition_that_widens_one_channel() -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(1, 3, 3, 3))
    model = net.model({"x": (2, 3, 7, 7)}, net.norm(net.op("Add", convolved, net.weight(4, 1, 1)), 4))
    assert "may make 4 channels of one" in refusal(model)


def test_refuses_addition_that_does_not_fit() -> None:
    net = Net()
    added = net.op("Add", net.op("Conv", "x", net.weight(4, 3, 3, 3)), net.weight(5, 1, 1))
    assert "leaves the rank of 't2' free" in refusal(net.model({"x": (2, 3, 7, 7)}, net.norm(added, 4)))


def test_folds_into_both_summands() -> None:
    net = Net()
    first, second = (net.op("Conv", net.op(operator, "x"), net.weight(3, 3, 1, 1)) for operator in ("Abs", "Neg"))
    model = net.model({"x": (2, 3, 7, 7)}, net.norm(net.op("Add", first, second), 3))
    folded, (entry,) = fold_and_compare(model, x=noise(2, 3, 7, 7))
    assert operators(folded) == ["Abs", "Conv", "Neg", "Conv", "Add"]
    assert entry.into == "conv_1, conv_3"


def test_refuses_residual_from_graph_input() -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(3, 3, 1, 1))
    model = net.model({"x": (2, 3, 7, 7)}, net.norm(net.op("Add", convolved, "x"), 3))
    assert "'x' is given by the caller" in refusal(model)


@pytest.mark.parametrize("slot", ["weight", "bias"])
def test_refuses_computed_operand(slot: str) -> None:
    net = Net()
    weight, bias = net.weight(4, 3, 1, 1), net.weight(4)
    if slot == "weight":
        weight = net.op("Mul", weight, net.op("ReduceMax", "x", keepdims=0))
    else:
        bias = net.op("Mul", bias, net.op("ReduceMax", "x", keepdims=0))
    model = net.model({"x": (2, 3, 7, 7)}, net.norm(net.op("Conv", "x", weight, bias), 4))
    assert f"the {slot} of Conv" in refusal(model)


def test_accepts_zero_statistics_that_cancel() -> None:
    """A dead channel: scale 0 folds to a filter of zeros."""
    net = Net()
    net.initializers.clear()
    parameters = [net.constant(np.array(vector, np.float32)) for vector in ([0, 2], [1, 0], [3, 3], [1, 0])]
    output = net.op("BatchNormalization", net.op("Conv", "x", net.weight(2, 3, 1)), *parameters)
    fold_and_compare(net.model({"x": (4, 3, 5)}, output), x=noise(4, 3, 5))
