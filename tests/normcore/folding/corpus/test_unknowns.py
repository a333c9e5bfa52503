"""What a file leaves open stays open: ranks, sizes and datatypes that a fold would have to know; nothing changes."""

from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
import pytest
from onnx import TensorProto

from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.options import FoldOptions
from tests.normcore.folding.builder import Net, reasons

C = 4
FREE = (2, 3, "h", "w", 1)  # Squeeze drops the last axis, and would drop others that happen to be of size 1
Build = Callable[[Net], str]
Ahead = Callable[[Net, str], str]


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def conv(net: Net, channels: int = C) -> str:
    """(2, C, h, w), of which the file tells nothing."""
    return net.op("Conv", net.op("Squeeze", "x"), net.weight(channels, 3, 1, 1))


def all_values(net: Net) -> str:
    """A vector of as many integers as there are inputs, which the file does not count."""
    return net.op("Cast", net.op("Reshape", "x", ints(net, -1)), to=TensorProto.INT64)


def check(
    net: Net, output: str, expected: str, *, shape: Sequence[int | str] = FREE, **options: Unpack[FoldOptions]
) -> None:
    model = net.model({"x": shape}, output)
    assert expected in "; ".join(reasons(model, **options))


BACKWARD: dict[str, tuple[int, Build, str]] = {
    "concat-from-the-back": (17, lambda net: net.op("Concat", conv(net, 2), conv(net, 2), axis=-3), "joins free"),
    "concat-of-free-channels": (17, lambda net: net.op("Concat", conv(net, 2), conv(net, 2), axis=1), "each input of"),
    "sum": (17, lambda net: net.op("Add", conv(net), conv(net)), "leaves the rank of what Add 'add_4' adds free"),
    "constant": (17, lambda net: net.op("Mul", conv(net), net.weight(C, 1, 1)), "and so what Mul 'mul_2' scales"),
    "pad-from-the-back": (
        18,
        lambda net: net.op("Pad", conv(net), ints(net, 1, 1), "", ints(net, -1), mode="edge"),
        "and so what Pad 'pad_2' pads",
    ),
    "reduction": (17, lambda net: net.op("ReduceMean", conv(net), axes=[2], keepdims=0), "and so what ReduceMean"),
    "slice-of-channels": (
        17,
        lambda net: net.op("Slice", conv(net, 6), ints(net, 0), ints(net, C), ints(net, 1)),
        "leaves free how many channels Slice 'slice_2' cuts",
    ),
    "slice-from-the-back": (
        17,
        lambda net: net.op("Slice", conv(net), ints(net, 0), ints(net, 2), ints(net, -1)),
        "and so what Slice 'slice_2' cuts",
    ),
    "split-from-the-back": (
        17,
        lambda net: net.op("Split", conv(net, C), ints(net, C), axis=-3),
        "and so what Split 'split_2' splits",
    ),
    "split-of-free-channels": (
        18,
        lambda net: net.op("Split", conv(net, C), axis=1, num_outputs=1),
        "leaves free how Split 'split_2' splits the channels",
    ),
    "reshape": (17, lambda net: net.op("Reshape", conv(net), ints(net, 2, C, -1)), "and so what Reshape"),
    "flatten": (17, lambda net: net.op("Flatten", conv(net)), "and so what Flatten 'flatten_2' regroups"),
    "unsqueeze": (17, lambda net: net.op("Unsqueeze", conv(net), ints(net, 2)), "and so what Unsqueeze"),
    "transpose": (
        17,
        lambda net: net.op("Transpose", net.op("Transpose", conv(net))),
        "and so what Transpose 'transpose_3' moves",
    ),
    "matmul": (
        17,
        lambda net: net.op("MatMul", net.op("Squeeze", "x"), net.weight(3, C)),
        "and so the axis that MatMul",
    ),
    "resize": (
        18,
        lambda net: net.op("Resize", conv(net), "", net.constant(np.array([2], np.float32)), axes=[-1]),
        "may resize the axis of the channels",
    ),
    "computed-shape": (
        17,
        lambda net: net.op("Reshape", net.op("Conv", "x", net.weight(C, 3, 1, 1, 1)), all_values(net)),
        "is computed at run time",
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_unknown_stays_behind(name: str) -> None:
    opset, build, expected = BACKWARD[name]
    net = Net(opset=opset)
    check(net, net.norm(build(net), C), expected)


FORWARD: dict[str, tuple[int, Ahead, str]] = {
    "matmul": (17, lambda net, name: net.op("MatMul", name, net.weight(5, 4)), "and so the axis that MatMul"),
    "constant": (17, lambda net, name: net.op("Add", name, net.weight(3, 1, 1)), "and so what Add 'add_2' scales"),
    "squeeze": (17, lambda net, name: net.op("Squeeze", name, ints(net, 3)), "and so what Squeeze 'squeeze_2' moves"),
    "reduction": (17, lambda net, name: net.op("ReduceMean", name, axes=[2]), "and so what ReduceMean"),
    "split": (
        17,
        lambda net, name: net.op("Split", name, ints(net, 3), axis=-3),
        "and so what Split 'split_2' splits",
    ),
    "cast-like": (17, lambda net, name: net.op("CastLike", net.op("Squeeze", "x"), name), "it names the datatype"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_unknown_stays_before(name: str) -> None:
    opset, build, expected = FORWARD[name]
    net = Net(opset=opset)
    ahead = build(net, net.norm(net.op("Squeeze", "x"), 3))
    check(net, net.op("Conv", ahead, net.weight(5, 3, 1, 1)), expected)


def test_axis_of_channels_that_is_dropped_stays() -> None:
    net = Net()
    alone = net.op("Squeeze", net.norm("x", 1), ints(net, 1))
    check(net, net.op("MatMul", alone, net.weight(5, 4)), "drops the axis of the channels", shape=(2, 1, 5))


def test_summand_without_the_axis_of_the_channels_stays() -> None:
    net = Net()
    rows = net.op("MatMul", net.op("Reshape", "x", ints(net, 5, 6)), net.weight(6, 5))
    total = net.op("Add", net.op("Conv", "x", net.weight(C, 3, 1, 1)), rows)
    check(net, net.norm(total, C), "whose axes are not known", shape=(2, 3, 1, 5))


def test_row_that_makes_channels_of_one_stays() -> None:
    net = Net()
    wide = net.op("Add", net.op("Conv", "x", net.weight(1, 3, 1, 1)), net.weight(C, 1, 1))
    check(
        net,
        net.op("Mul", wide, net.weight(C, 1, 1)),
        "leaves free how many channels there are on axis 1",
        shape=(2, 3, 6, 5),
    )


def test_norm_of_a_constant_stays() -> None:
    """Its output is the same in every run, and so the constant of what reads it."""
    net = Net()
    table = net.norm(net.constant(np.ones((2, C, 1, 1), np.float32)), C)
    total = net.op("Add", net.op("Conv", "x", net.weight(C, 3, 1, 1)), table)
    check(net, total, "it is a constant of Add", shape=(2, 3, 6, 5))


def test_far_convolution_stays() -> None:
    net = Net()
    name = net.op("Conv", "x", net.weight(C, 3, 1, 1))
    for _ in range(300):
        name = net.op("Identity", name)
    check(net, net.norm(name, C), "more than 256 operators", shape=(2, 3, 6, 5))


GAINS: dict[str, tuple[int, Build, Sequence[int | str], str]] = {
    "free-rank": (
        17,
        lambda net: net.op("LayerNormalization", net.op("Squeeze", "x"), net.weight(3)),
        FREE,
        "and so what LayerNormalization",
    ),
    "free-size": (
        17,
        lambda net: net.op("LayerNormalization", "x", net.weight(3)),
        (2, 5, "c"),
        "leaves free how many channels there are on axis 2",
    ),
    "several-axes": (
        17,
        lambda net: net.op("LayerNormalization", "x", net.weight(3), axis=1),
        (2, 5, 3),
        "normalizes over several axes",
    ),
}


@pytest.mark.parametrize("name", GAINS)
def test_unknown_gain_stays(name: str) -> None:
    opset, build, shape, expected = GAINS[name]
    net = Net(opset=opset)
    check(net, net.op("MatMul", build(net), net.weight(3, 5)), expected, shape=shape, move_gains=True)


def test_gain_per_group_stays() -> None:
    """Until opset 21, of which alone onnx's checker knows the operator."""
    net = Net(opset=21)
    normed = net.op("GroupNormalization", "x", net.weight(3), net.weight(3), num_groups=3)
    model = net.model({"x": (2, 3, 4)}, net.op("Conv", normed, net.weight(5, 3, 1)))
    assert fold_onnx(model, move_gains=True)[1][0].status == "folded"
    model.opset_import[0].version = 18
    assert "of opset 18 has one gain per group" in reasons(model, move_gains=True)[0]
