"""The same operator in its other forms: defaults, negative axes, attributes that became inputs."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators

C = 6
SHAPE = (2, 3, 10, 8)
Build = Callable[[Net, str], str]


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def conv(net: Net, channels: int = C) -> str:
    return net.op("Conv", "x", net.weight(channels, 3, 1, 1))


BACKWARD: dict[str, tuple[int, Callable[[Net], str], list[str]]] = {
    "reduction-keeps-axes": (17, lambda net: net.op("ReduceMean", conv(net), axes=[0]), ["ReduceMean"]),
    "reduction-axes-as-input": (
        18,
        lambda net: net.op("ReduceMean", conv(net), ints(net, -1), keepdims=0),
        ["ReduceMean"],
    ),
    "reduction-of-nothing": (18, lambda net: net.op("ReduceMean", conv(net), noop_with_empty_axes=1), ["ReduceMean"]),
    "shuffle": (17, lambda net: net.op("DepthToSpace", conv(net, 4 * C), blocksize=2), ["DepthToSpace"]),
    "concat": (
        17,
        lambda net: net.op("Concat", conv(net, 2), net.op("ConvTranspose", "x", net.weight(3, 4, 1, 1)), axis=-3),
        ["ConvTranspose", "Concat"],
    ),
    "slice": (
        17,
        lambda net: net.op("Slice", conv(net, 8), ints(net, -7), ints(net, -1), ints(net, -3)),
        ["Slice"],
    ),
    "upsample-opset-7": (7, lambda net: net.op("Upsample", conv(net), scales=[1.0, 1.0, 2.0, 2.0]), ["Upsample"]),
    "pad-named-axes": (
        18,
        lambda net: net.op("Pad", conv(net), ints(net, 1, 2), "", ints(net, -1), mode="edge"),
        ["Pad"],
    ),
    "counted-zeros-of-a-rounded-up-pool": (
        17,
        lambda net: net.op(
            "AveragePool", conv(net), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1
        ),
        ["AveragePool", "Add"],
    ),
    "counted-zeros-of-automatic-padding": (
        17,
        lambda net: net.op("AveragePool", conv(net), kernel_shape=[2, 2], auto_pad="SAME_UPPER", count_include_pad=1),
        ["AveragePool", "Add"],
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_folds_backward(name: str) -> None:
    opset, build, between = BACKWARD[name]
    net = Net(opset=opset)
    folded, _ = fold_and_compare(net.model({"x": SHAPE}, net.norm(build(net), C)), x=noise(*SHAPE))
    assert operators(folded) == ["Conv", *between]


RESIZED: dict[int, Callable[[Net, str], str]] = {
    10: lambda net, name: net.op("Resize", name, net.constant(np.array([1, 1, 2, 2], np.float32))),
    18: lambda net, name: net.op("Resize", name, "", "", ints(net, 13, 11), axes=[-2, -1], mode="linear"),
}


@pytest.mark.parametrize("opset", RESIZED)
def test_folds_through_resizes_of_other_forms(opset: int) -> None:
    net = Net(opset=opset)
    model = net.model({"x": SHAPE}, net.norm(RESIZED[opset](net, conv(net)), C))
    folded, _ = fold_and_compare(model, x=noise(*SHAPE))
    assert operators(folded) == ["Conv", "Resize"]


def halves(net: Net, name: str, **attributes: int) -> str:
    net.op("Split", name, output="front", **attributes)
    net.nodes[-1].output.append("back")
    sizes = {"axis": 1} if attributes else {}
    return net.op("Mul", *(net.op("Conv", part, net.weight(4, 2 if sizes else 4, 1, 1)) for part in ("front", "back")))


FORWARD: dict[str, tuple[Build, list[str]]] = {
    "bias-alone-between": (
        lambda net, name: net.op("Conv", net.op("Add", name, net.weight(4, 1, 1)), net.weight(5, 4, 3, 3)),
        ["Conv"],
    ),
    "split-channels": (lambda net, name: halves(net, name, axis=1), ["Split", "Conv", "Conv", "Mul"]),
    "split-the-batch": (halves, ["Split", "Conv", "Conv", "Mul"]),
    "views": (
        lambda net, name: net.op(
            "Conv",
            net.op("Squeeze", net.op("Unsqueeze", name, ints(net, 0, -1)), ints(net, 0, 5)),
            net.weight(5, 4, 3, 3),
        ),
        ["Unsqueeze", "Squeeze", "Conv"],
    ),
    "transposed-to-the-front": (
        lambda net, name: net.op("Conv", net.op("Transpose", net.op("Transpose", name)), net.weight(5, 4, 3, 3)),
        ["Transpose", "Transpose", "Conv"],
    ),
    "zeros-of-automatic-padding": (
        lambda net, name: net.op("Conv", name, net.weight(5, 4, 3, 3), auto_pad="SAME_LOWER"),
        ["Add", "Conv"],
    ),
    "strided-points": (
        lambda net, name: net.op("ConvTranspose", name, net.weight(4, 5, 1, 1), strides=[2, 2]),
        ["Add", "ConvTranspose"],
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_folds_forward(name: str) -> None:
    build, expected = FORWARD[name]
    net = Net(opset=17 if "split" not in name else 13)
    folded, _ = fold_and_compare(net.model({"x": (2, 4, 10, 8)}, build(net, net.norm("x", 4))), x=noise(2, 4, 10, 8))
    assert operators(folded) == expected
