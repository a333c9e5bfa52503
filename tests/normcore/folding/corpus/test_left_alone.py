"""What must stay: each network with the reason of its one norm, and not a byte of the network changed."""

from collections.abc import Callable
from typing import Any, Unpack

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.options import FoldOptions
from tests.normcore.folding.builder import Net, noise, reasons

C = 6
SHAPE = (2, 3, 10, 8)
Build = Callable[[Net], str]


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def conv(net: Net, channels: int = C) -> str:
    return net.op("Conv", "x", net.weight(channels, 3, 1, 1))


def with_second_output(net: Net, name: str) -> str:
    """The last node also gives another tensor."""
    net.nodes[-1].output.append(name)
    return str(net.nodes[-1].output[0])


def reason(model: ModelProto, **options: Unpack[FoldOptions]) -> str:
    return "; forward: ".join(reasons(model, **options))


def dropout_with_mask(net: Net) -> str:
    net.op("Dropout", conv(net))
    return with_second_output(net, "mask")


def dropout_of_unknown_mode(net: Net) -> str:
    mode = net.op("Cast", net.op("ReduceMax", "x", keepdims=0), to=TensorProto.BOOL)
    return net.op("Dropout", conv(net), net.constant(np.float32(0.5)), mode)


def pool_of_moved_channels(net: Net) -> str:
    moved = net.op("Transpose", conv(net), perm=[0, 2, 1, 3])
    return net.op("Transpose", net.op("AveragePool", moved, kernel_shape=[2, 2]), perm=[0, 2, 1, 3])


def weight_of(value: float) -> Build:
    return lambda net: net.op("Conv", "x", net.constant(np.full((C, 3, 1, 1), value, np.float32)))


BACKWARD: dict[str, tuple[Build, int, str]] = {
    "reduction-moves-the-axis": (
        lambda net: net.op("ReduceMean", conv(net, 10), axes=[0], keepdims=0),
        10,
        "channels are on axis 2",
    ),
    "reduction-of-everything": (lambda net: net.op("ReduceMean", conv(net)), 1, "reduces the axis of the channels"),
    "pool-of-moved-channels": (pool_of_moved_channels, 5, "pools over the axis of the channels"),
    "split-of-another-axis": (
        lambda net: net.op("Split", conv(net), ints(net, 2)),
        C,
        "splits another axis than the channels",
    ),
    "reversed-channels": (
        lambda net: net.op("Slice", conv(net), ints(net, -1), ints(net, -99), ints(net, 1), ints(net, -1)),
        C,
        "reverses the channels",
    ),
    "reshape-that-allows-zero": (
        lambda net: net.op("Reshape", conv(net), ints(net, 2, C, 80), allowzero=1),
        C,
        "allows sizes of 0",
    ),
    "dropout-with-mask": (dropout_with_mask, C, "also gives its mask"),
    "dropout-of-unknown-mode": (dropout_of_unknown_mode, C, "may be in training mode"),
    "squeeze-of-unknown-axes": (lambda net: net.op("Squeeze", conv(net)), C, "drops whichever axes have size 1"),
    "nan-weight": (weight_of(np.nan), C, "holds NaN or infinity"),
    "infinite-weight": (weight_of(np.inf), C, "holds NaN or infinity"),
    "nan-constant": (
        lambda net: net.op("Add", conv(net), net.constant(np.full((C, 1, 1), np.nan, np.float32))),
        C,
        "holds NaN or infinity",
    ),
    "division-by-zero": (
        lambda net: net.op("Div", conv(net), net.constant(np.zeros((C, 1, 1), np.float32))),
        C,
        "divides by zero",
    ),
    "shuffle-of-moved-channels": (
        lambda net: net.op("Transpose", net.op("DepthToSpace", conv(net, 8), blocksize=2), perm=[0, 2, 1, 3]),
        20,
        "moves the axis of the channels apart",
    ),
    "unknown-operator": (lambda net: net.op("CumSum", conv(net), net.constant(np.int64(2))), C, "no rule folds"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_stays_behind(name: str) -> None:
    build, channels, expected = BACKWARD[name]
    net = Net()
    assert expected in reason(net.model({"x": SHAPE}, net.norm(build(net), channels)))


def test_smoothing_resize_stays() -> None:
    net = Net(opset=18)
    scales = net.constant(np.array([1, 1, 0.5, 0.5], np.float32))
    small = net.op("Resize", conv(net), "", scales, mode="linear", antialias=1)
    assert "smooths" in reason(net.model({"x": SHAPE}, net.norm(small, C)))


@pytest.mark.parametrize("rounding", ["ceil", "round_prefer_ceil", "floor"])
def test_resize_that_may_move_the_channels_stays(rounding: str) -> None:
    net = Net(opset=11)
    attributes = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": rounding}
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    large = net.op("Resize", conv(net), net.constant(np.ones(0, np.float32)), scales, mode="nearest", **attributes)
    model = net.model({"x": SHAPE}, net.norm(large, C))
    if rounding == "floor":
        assert fold_onnx(model)[1][0].status == "folded"
    else:
        assert "as the runtime likes" in reason(model)


Ahead = Callable[[Net, str], str]

FORWARD: dict[str, tuple[Ahead, str]] = {
    "concat-along-another-axis": (
        lambda net, name: net.op("Conv", net.op("Concat", "x", name, axis=2), net.weight(4, 3, 1, 1)),
        "joins it with what is not normalized",
    ),
    "sum": (lambda net, name: net.op("Add", net.op("Tanh", "x"), name), "adds it to what is not normalized"),
    "reduced-channels": (
        lambda net, name: net.op("Conv", net.op("ReduceMean", name, axes=[1]), net.weight(4, 1, 1, 1)),
        "reduces the axis of the channels",
    ),
    "weight-of-transposed": (
        lambda net, name: net.op("ConvTranspose", net.constant(noise(2, 2, 5, 4)), name),
        "it is the weight of ConvTranspose",
    ),
    "second-operand": (lambda net, name: net.op("MatMul", net.constant(noise(10, 10)), name), "second operand"),
    "addend": (
        lambda net, name: net.op(
            "Gemm",
            net.constant(noise(2, 4)),
            net.constant(noise(4, 3)),
            net.op("Flatten", net.op("GlobalAveragePool", name)),
        ),
        "an addend of Gemm",
    ),
    "grown-graph": (
        lambda net, name: net.op(
            "Mul",
            *(
                net.op(
                    "MatMul",
                    net.op("Transpose", net.op(operator, name), perm=[0, 2, 3, 1]),
                    net.weight(3, 5),
                )
                for operator in ("Identity", "Dropout")
            ),
        ),
        "the graph would grow by 1 nodes",
    ),
    "split-unknown-channels": (
        lambda net, name: net.op("Gather", name, ints(net, 0), axis=1),
        "no rule folds into or through Gather",
    ),
    "nobody": (lambda net, name: net.op("Tanh", "x"), "nothing reads"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_stays_before(name: str) -> None:
    build, expected = FORWARD[name]
    net = Net()
    assert expected in reason(net.model({"x": SHAPE}, build(net, net.norm("x", 3))))


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [({"pads": [1, 0, -1, 0]}, "negative widths"), ({"auto_pad": "SAME_UPPER"}, "finds its padding at run time")],
    ids=["negative", "auto"],
)
@pytest.mark.parametrize("option", ["pad", "map"])
def test_padding_that_no_constant_stands_for_stays(option: Any, attributes: dict[str, Any], expected: str) -> None:
    net = Net()
    model = net.model({"x": SHAPE}, net.op("Conv", net.norm("x", 3), net.weight(4, 3, 3, 3), **attributes))
    assert expected in reason(model, zero_padding=option)


def test_pad_of_old_opsets_is_not_written() -> None:
    net = Net(opset=10)
    model = net.model({"x": SHAPE}, net.op("Conv", net.norm("x", 3), net.weight(4, 3, 3, 3), pads=[1] * 4))
    assert "Pad of opset 10" in reason(model, zero_padding="pad")


@pytest.mark.parametrize("shown", ["large", "small"])
def test_branch_that_is_an_output_stays(shown: str) -> None:
    net = Net()
    branches = {
        "large": net.op("Conv", "x", net.weight(C, 3, 3, 3), pads=[1] * 4),
        "small": net.op("Conv", "x", net.weight(C, 3, 1, 1)),
    }
    model = net.model({"x": SHAPE}, net.op("Add", *branches.values()), branches[shown])
    assert fold_onnx(model)[0] == model


def test_branch_of_one_position_that_is_added_everywhere_stays() -> None:
    """An unpadded kernel over the whole image gives one position, which the sum broadcasts."""
    net = Net()
    parts = [net.op("Conv", "x", net.weight(C, 3, size, size)) for size in (3, 1)]
    model = net.model({"x": (2, 3, 3, 3)}, net.op("Add", *parts))
    assert fold_onnx(model)[0] == model


def test_computed_weight_that_is_an_output_or_not_finite_stays() -> None:
    for value, outputs in ((1.0, 2), (0.0, 1)):
        net = Net()
        direction = net.constant(np.full((C, 3, 1, 1), value, np.float32))
        weight = net.op("Div", direction, net.op("ReduceL2", direction, axes=[1, 2, 3]))
        model = net.model({"x": SHAPE}, *[net.op("Conv", "x", weight), weight][:outputs])
        assert fold_onnx(model)[0] == model


def test_row_along_several_axes_stays() -> None:
    net = Net()
    scaled = net.op("Mul", net.op("Mul", conv(net, 4), net.weight(4, 1, 1)), net.weight(8))
    assert "vary along several axes" in reason(net.model({"x": SHAPE}, scaled))


def tokens(net: Net, *, axis: int = -1, shows_mean: bool = False) -> ModelProto:
    """Layer norm -> MatMul without an Add behind it."""
    normed = net.op("LayerNormalization", "x", net.weight(C), net.weight(C), axis=axis)
    outputs = [with_second_output(net, "mean")] if shows_mean else []
    product = net.op("MatMul", normed, net.weight(C, 5))
    return net.model({"x": (2, 7, C)}, product, *(["mean"] if outputs else []))


def test_gain_stays_where_the_graph_would_grow_or_shows_the_statistics() -> None:
    assert "the graph would grow by 1 nodes" in reason(tokens(Net()), move_gains=True)
    assert "also gives its statistics" in reason(tokens(Net(), shows_mean=True), move_gains=True)
