from typing import Any

import pytest

from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators, refusal


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        pytest.param((6, 4, 3), {}, id="1d"),
        pytest.param((6, 4, 2, 2), {"strides": [2, 2]}, id="2d"),
        pytest.param((4, 2, 3, 3, 3), {"output_padding": [1, 1, 1], "strides": [2, 2, 2]}, id="3d-output-padding"),
        pytest.param((6, 6, 3, 3), {}, id="square"),
        pytest.param((6, 2, 3, 3), {"group": 3}, id="grouped"),
        pytest.param((6, 3, 2, 2), {"group": 2}, id="grouped-square"),
        pytest.param((4, 4, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}, id="grouped-square-weight"),
        pytest.param((4, 1, 3, 3), {"group": 4}, id="depthwise"),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_folds_transposed_convolution(shape: tuple[int, ...], attributes: dict[str, Any], has_bias: bool) -> None:
    net = Net()
    channels = shape[1] * attributes.get("group", 1)
    inputs = ["x", net.weight(*shape)] + ([net.weight(channels)] if has_bias else [])
    model_input = (2, shape[0], *range(5, 5 + len(shape) - 2))
    model = net.model({"x": model_input}, net.norm(net.op("ConvTranspose", *inputs, **attributes), channels))
    folded, (entry,) = fold_and_compare(model, x=noise(*model_input))
    assert operators(folded) == ["ConvTranspose"]
    assert (entry.rule, entry.num_features) == ("conv_transpose", channels)


def test_folds_through_addition() -> None:
    net = Net()
    added = net.op("Add", net.op("ConvTranspose", "x", net.weight(6, 2, 2, 2), group=3), net.weight(1, 6, 1, 1))
    folded, (entry,) = fold_and_compare(net.model({"x": (2, 6, 5, 4)}, net.norm(added, 6)), x=noise(2, 6, 5, 4))
    assert operators(folded) == ["ConvTranspose"]
    assert entry.pattern == "ConvTranspose -> Add -> BatchNormalization"


def test_refuses_other_number_of_channels() -> None:
    net = Net()
    model = net.model({"x": (2, 6, 5, 4)}, net.norm(net.op("ConvTranspose", "x", net.weight(6, 2, 2, 2), group=3), 2))
    assert "it normalizes 2 channels, and ConvTranspose 'convtranspose_0' gives 6" in refusal(model)
