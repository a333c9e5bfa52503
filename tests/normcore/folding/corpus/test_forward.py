"""Every way forward, as a small graph of random weights whose axes all have different sizes."""

from collections.abc import Callable
from typing import Any, Unpack

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from normcore.errors import ParameterError
from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.options import FoldOptions, ZeroPadding
from normcore.folding.report import PlanEntry
from tests.normcore.folding.builder import Net, fold_and_compare, forward_refusal, noise, operators
from tests.normcore.folding.onnx.test_graph import conditional

C = 6
SPATIAL = {1: (10,), 2: (10, 8), 3: (6, 5, 4)}
Build = Callable[[Net, str], str]


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def network(build: Build, *, rank: int = 2, sign: int = 0) -> ModelProto:
    """Batch norm of the graph's input -> what is built; scales of one sign, or of both (0)."""
    net = Net()
    magnitude = np.abs(noise(C)) + np.float32(0.1)
    scale = magnitude * (np.array([1, -1] * 3, np.float32) if sign == 0 else sign)
    vectors = [scale, noise(C), noise(C), magnitude]
    normed = net.op("BatchNormalization", "x", *map(net.constant, vectors))
    return net.model({"x": (2, C, *SPATIAL[rank])}, build(net, normed))


def check(model: ModelProto, *expected: str, rank: int = 2, **options: Unpack[FoldOptions]) -> PlanEntry:
    folded, entries = fold_and_compare(model, options=options, x=noise(2, C, *SPATIAL[rank]))
    assert operators(folded) == list(expected)
    (entry,) = entries
    assert (entry.status, entry.direction) == ("folded", "forward")
    return entry


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "attributes", [{}, {"group": 2}, {"group": C}, {"auto_pad": "VALID", "dilations": [2]}], ids=str
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_folds_into_convolution(rank: int, attributes: dict[str, Any], has_bias: bool) -> None:
    attributes = {key: value * rank if key == "dilations" else value for key, value in attributes.items()}

    def build(net: Net, name: str) -> str:
        weight = net.weight(2 * C, C // attributes.get("group", 1), *[2] * rank)
        return net.op("Conv", name, weight, *([net.weight(2 * C)] if has_bias else []), **attributes)

    entry = check(network(build, rank=rank), "Conv", rank=rank)
    assert entry.rule == "conv_input"


PASSING: dict[str, tuple[Build, list[str]]] = {
    "identity": (lambda net, name: net.op("Identity", name), ["Identity"]),
    "dropout": (lambda net, name: net.op("Dropout", name), ["Dropout"]),
    "average-pool": (lambda net, name: net.op("AveragePool", name, kernel_shape=[2, 2]), ["AveragePool"]),
    "pad-reflect": (lambda net, name: net.op("Pad", name, ints(net, 0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"), ["Pad"]),
    "pad-edge": (lambda net, name: net.op("Pad", name, ints(net, 0, 0, 1, 1, 0, 0, 1, 1), mode="edge"), ["Pad"]),
    "resize": (
        lambda net, name: net.op("Resize", name, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear"),
        ["Resize"],
    ),
    "slice-space": (lambda net, name: net.op("Slice", name, ints(net, 1), ints(net, 9), ints(net, 2)), ["Slice"]),
    "transposes": (
        lambda net, name: net.op("Transpose", net.op("Transpose", name, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2]),
        ["Transpose", "Transpose"],
    ),
    "constants": (
        lambda net, name: net.op("Sub", net.weight(C, 1, 1), net.op("Mul", name, net.weight(C, 1, 1))),
        [],
    ),
    "concat": (
        lambda net, name: net.op(
            "Slice", net.op("Concat", "x", name, axis=1), ints(net, 3), ints(net, 9), ints(net, 1)
        ),
        ["Concat", "Slice"],
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_folds_through(name: str) -> None:
    build, between = PASSING[name]
    folded, entries = fold_and_compare(
        network(lambda net, normed: net.op("Conv", build(net, normed), net.weight(4, C, 1, 1))), x=noise(2, C, 10, 8)
    )
    assert operators(folded) == [*between, "Conv"]
    assert {entry.status for entry in entries} == {"folded"}


def test_folds_through_space_to_depth() -> None:
    model = network(
        lambda net, name: net.op("Conv", net.op("SpaceToDepth", name, blocksize=2), net.weight(5, 4 * C, 1, 1))
    )
    check(model, "SpaceToDepth", "Conv")


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_folds_through_space_to_depth_of_either_order(mode: str) -> None:
    """A choice since opset 28, which neither onnxruntime nor onnx.reference has: undone by its inverse, it is none."""
    net = Net(opset=28)
    deep = net.op("SpaceToDepth", net.norm("x", 3), blocksize=2, mode=mode)
    weight = net.weight(5, 12, 1, 1)
    folded, _ = fold_onnx(net.model({"x": (2, 3, 6, 4)}, net.op("Conv", deep, weight)))
    assert operators(folded) == ["SpaceToDepth", "Conv"]
    factors = np.asarray(
        numpy_helper.to_array(folded.graph.initializer[0]) / numpy_helper.to_array(net.initializers[weight])
    )
    blocks = factors[0].reshape((3, 4) if mode == "CRD" else (4, 3))
    assert np.ptp(blocks, axis=1 if mode == "CRD" else 0).max() < 1e-5 < np.ptp(blocks)


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_folds_through_depth_to_space_of_equal_maps_only(mode: str) -> None:
    def build(net: Net, name: str) -> str:
        return net.op("Conv", net.op("DepthToSpace", name, blocksize=2, mode=mode), net.weight(5, 3, 1, 1))

    for order in ("CRD", "DCR"):
        net = Net()
        repeat = np.repeat if order == "CRD" else np.tile
        vectors = [np.asarray(repeat(np.abs(noise(3, seed=seed)) + 0.1, 4), np.float32) for seed in range(4)]
        normed = net.op("BatchNormalization", "x", *map(net.constant, vectors))
        model = net.model({"x": (2, 12, 6, 5)}, build(net, normed))
        if mode == order:
            folded, _ = fold_and_compare(model, x=noise(2, 12, 6, 5))
            assert operators(folded) == ["DepthToSpace", "Conv"]
        else:
            assert "have different maps" in forward_refusal(model)


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "ReduceMean", None])
@pytest.mark.parametrize("view", ["Flatten", "Reshape"])
@pytest.mark.parametrize("linear", ["Gemm", "MatMul"])
def test_folds_through_pool_and_flatten_into_linear(pool: str | None, view: str, linear: str) -> None:
    def build(net: Net, name: str) -> str:
        attributes: dict[str, Any] = {"axes": [2, 3]} if pool == "ReduceMean" else {}
        name = net.op(pool, name, **attributes) if pool else name
        flat = net.op(view, name, *([ints(net, 2, -1)] if view == "Reshape" else []))
        return net.op(linear, flat, net.weight(C if pool else C * 80, 5))

    check(network(build), *filter(None, (pool, view)), "Gemm")


@pytest.mark.parametrize(
    "attributes",
    [{}, {"transB": 1, "alpha": 0.5}, {"transA": 1, "beta": -2.0}, {"transA": 1, "transB": 1, "alpha": 3.0}],
    ids=str,
)
def test_folds_into_gemm(attributes: dict[str, Any]) -> None:
    def build(net: Net, name: str) -> str:
        flat = net.op("Flatten", net.op("GlobalAveragePool", name))
        flat = net.op("Transpose", flat, perm=[1, 0]) if attributes.get("transA") else flat
        weight = net.weight(5, C) if attributes.get("transB") else net.weight(C, 5)
        return net.op("Gemm", flat, weight, net.weight(5), **attributes)

    model = network(build)
    folded, _ = fold_and_compare(model, x=noise(2, C, 10, 8))
    assert "BatchNormalization" not in operators(folded)


@pytest.mark.parametrize("has_bias", [False, True])
def test_folds_into_linear_of_tokens(has_bias: bool) -> None:
    def build(net: Net, name: str) -> str:
        tokens = net.op("Transpose", net.op("Reshape", name, ints(net, 0, 0, -1)), perm=[0, 2, 1])
        product = net.op("MatMul", tokens, net.weight(C, 5))
        return net.op("Add", net.weight(5), product) if has_bias else product

    check(network(build), "Reshape", "Transpose", "MatMul", "Add")


def test_folds_into_all_consumers() -> None:
    def build(net: Net, name: str) -> str:
        pooled = net.op("Flatten", net.op("GlobalAveragePool", name))
        linear = net.op("Gemm", pooled, net.weight(C, 4))
        wide = net.op("Conv", name, net.weight(4, C, 10, 8))
        return net.op("Add", net.op("Flatten", wide), linear)

    entry = check(network(build), "GlobalAveragePool", "Flatten", "Gemm", "Conv", "Flatten", "Add")
    assert sorted((entry.into or "").split(", ")) == ["conv_4", "gemm_3"]


def test_refuses_when_one_consumer_cannot() -> None:
    def build(net: Net, name: str) -> str:
        return net.op("Add", net.op("Conv", name, net.weight(C, C, 1, 1)), net.op("Tanh", name))

    assert forward_refusal(network(build)) == "Tanh 'tanh_2' is not linear"


def test_refuses_output_of_the_graph() -> None:
    net = Net()
    normed = net.norm("x", C)
    model = net.model({"x": (2, C, 9)}, normed, net.op("Conv", normed, net.weight(4, C, 1)))
    assert "is an output of the graph" in forward_refusal(model)


def test_refuses_diamond() -> None:
    def build(net: Net, name: str) -> str:
        joined = net.op("Concat", net.op("Identity", name), name, axis=1)
        return net.op("Conv", joined, net.weight(4, 2 * C, 1, 1))

    assert "on two ways" in forward_refusal(network(build))


def test_folds_scale_alone_into_padded_convolution() -> None:
    """Zeros stay zeros: a norm without a shift passes any padding."""
    net = Net()
    scaled = net.op("Mul", "x", net.weight(C, 1, 1))
    model = net.model({"x": (2, C, 10, 8)}, net.op("Conv", scaled, net.weight(4, C, 3, 3), auto_pad="SAME_UPPER"))
    check(model, "Conv")


PADDED: dict[str, Any] = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}


@pytest.mark.parametrize(
    ("option", "expected", "rule"),
    [
        ("auto", ["Add", "Conv"], "conv_input"),
        ("offset", ["Add", "Conv"], "conv_input"),
        ("map", ["Conv", "Add"], "conv_mapped"),
        ("pad", ["Pad", "Add", "Conv"], "conv_padded"),
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_folds_into_zero_padded_convolution(option: ZeroPadding, expected: list[str], rule: str, group: int) -> None:
    def build(net: Net, name: str) -> str:
        return net.op("Conv", name, net.weight(4, C // group, 3, 2), net.weight(4), group=group, **PADDED)

    entry = check(network(build), *expected, zero_padding=option)
    assert (entry.option, entry.rule) == ("offset" if option == "auto" else option, rule)


def test_pads_with_one_number_where_all_channels_agree() -> None:
    net = Net()
    parameters = [net.constant(np.full(C, value, np.float32)) for value in (-1.5, 0.25, 3, 2)]
    normed = net.op("BatchNormalization", "x", *parameters)
    model = net.model({"x": (2, C, "h", "w")}, net.op("Conv", normed, net.weight(4, C, 3, 2), **PADDED))
    folded, _ = fold_and_compare(model, options={"zero_padding": "pad"}, x=noise(2, C, 10, 8))
    assert operators(folded) == ["Pad", "Conv"]


def test_refuses_unknown_way_around_zero_padding() -> None:
    model = network(lambda net, name: net.op("Conv", name, net.weight(4, C, 3, 3)))
    with pytest.raises(ParameterError, match="one of auto, pad, map, offset, refuse"):
        fold_onnx(model, zero_padding="reflect")  # type: ignore[arg-type]  # what a caller may get wrong


def test_refuses_zero_padding_on_request() -> None:
    def build(net: Net, name: str) -> str:
        return net.op("Conv", name, net.weight(4, C, 3, 3), pads=[1, 1, 1, 1])

    assert "pads with zeros" in forward_refusal(network(build), zero_padding="refuse")


@pytest.mark.parametrize("option", ["pad", "offset"])
def test_refuses_to_divide_by_a_dead_channel(option: ZeroPadding) -> None:
    net = Net()
    scale = net.constant(np.array([1, 2, 0, 1, 1, 1], np.float32))
    normed = net.op("BatchNormalization", "x", scale, *net.norm_parameters(C)[1:])
    model = net.model({"x": (2, C, 10, 8)}, net.op("Conv", normed, net.weight(4, C, 3, 3), pads=[1, 1, 1, 1]))
    assert "scale" in forward_refusal(model, zero_padding=option)
    folded, _ = fold_and_compare(model, options={"zero_padding": "map"}, x=noise(2, C, 10, 8))
    assert operators(folded) == ["Conv", "Add"]


@pytest.mark.parametrize("option", ["pad", "map"])
def test_refuses_free_sizes_where_positions_matter(option: ZeroPadding) -> None:
    net = Net()
    conv = net.op("Conv", net.norm("x", C), net.weight(4, C, 3, 3), pads=[1, 1, 1, 1])
    model = net.model({"x": (2, C, "h", "w")}, conv)
    assert "leaves free at what size" in forward_refusal(model, zero_padding=option)


@pytest.mark.parametrize("operator", ["Relu", "LeakyRelu", "PRelu"])
def test_crosses_activation_on_request_with_positive_scales(operator: str) -> None:
    def build(net: Net, name: str) -> str:
        slope = [net.weight(C, 1, 1)] if operator == "PRelu" else []
        return net.op("Conv", net.op(operator, name, *slope), net.weight(4, C, 3, 3), pads=[1, 1, 1, 1])

    assert "is not linear" in forward_refusal(network(build, sign=1))
    assert "only positive scales" in forward_refusal(network(build), cross_activations=True)
    entry = check(network(build, sign=1), "Add", operator, "Conv", cross_activations=True)
    assert entry.option == "offset"


def test_folds_through_max_pool_with_positive_scales() -> None:
    def build(net: Net, name: str) -> str:
        pooled = net.op("MaxPool", name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        return net.op("Conv", pooled, net.weight(4, C, 3, 3))

    check(network(build, sign=1), "MaxPool", "Conv")
    assert "not keep the order" in forward_refusal(network(build))


def test_folds_torchcrepe_forward_only() -> None:
    """Conv -> ReLU -> norm -> MaxPool -> zero pad -> conv."""

    def build(net: Net, name: str) -> str:
        pooled = net.op("MaxPool", name, kernel_shape=[2, 1], strides=[2, 1])
        padded = net.op("Pad", pooled, ints(net, 0, 0, 3, 0, 0, 0, 4, 0))
        return net.op("Conv", padded, net.weight(4, C, 8, 1))

    net = Net()
    active = net.op("Relu", net.op("Conv", "x", net.weight(C, C, 3, 1)))
    vectors = [np.abs(noise(C)) + np.float32(0.1) for _ in range(4)]
    model = net.model(
        {"x": (2, C, 30, 1)}, build(net, net.op("BatchNormalization", active, *map(net.constant, vectors)))
    )
    folded, (entry,) = fold_and_compare(model, x=noise(2, C, 30, 1))
    assert operators(folded) == ["Conv", "Relu", "Add", "MaxPool", "Pad", "Conv"]
    assert (entry.direction, entry.option) == ("forward", "offset")


@pytest.mark.parametrize(
    ("attributes", "kernel", "is_shifted"),
    [({}, 3, False), ({"strides": [2, 2]}, 2, False), ({}, 1, True), ({"group": 2}, 1, True)],
)
def test_folds_into_transposed_convolution(attributes: dict[str, Any], kernel: int, is_shifted: bool) -> None:
    net = Net()
    scaled = net.norm("x", C) if is_shifted else net.op("Mul", "x", net.weight(C, 1, 1))
    weight = net.weight(C, 4, kernel, kernel)
    model = net.model({"x": (2, C, 10, 8)}, net.op("ConvTranspose", scaled, weight, **attributes))
    check(model, "ConvTranspose")


def test_leaves_offset_before_transposed_convolution() -> None:
    model = network(lambda net, name: net.op("ConvTranspose", name, net.weight(C, 4, 3, 3)))
    check(model, "Add", "ConvTranspose")


def test_folds_input_normalization() -> None:
    """(x / 255 - mean) / std before the first convolution."""
    net = Net()
    centred = net.op("Sub", net.op("Div", "x", net.constant(np.float32(255))), net.weight(1, C, 1, 1))
    standard = net.op("Div", centred, net.constant(np.abs(noise(1, C, 1, 1)) + np.float32(0.1)))
    model = net.model({"x": (2, C, 10, 8)}, net.op("Conv", standard, net.weight(4, C, 3, 3)))
    entry = check(model, "Conv")
    assert entry.operator == "Div -> Sub -> Div"


def test_does_not_widen_one_channel() -> None:
    """(N, 1, H, W) * (C, 1, 1) makes channels, which no convolution behind it can."""
    net = Net()
    model = net.model(
        {"x": (2, 1, 10, 8)}, net.op("Conv", net.op("Mul", "x", net.weight(C, 1, 1)), net.weight(4, C, 1, 1))
    )
    folded, entries = fold_onnx(model)
    assert folded == model
    assert entries == ()


def test_refuses_free_number_of_channels() -> None:
    net = Net()
    model = net.model(
        {"x": (2, "c", 10, 8)}, net.op("Conv", net.op("Mul", "x", net.weight(C, 1, 1)), net.weight(4, C, 1, 1))
    )
    assert fold_onnx(model)[0] == model


def test_refuses_norm_as_weight() -> None:
    net = Net()
    model = net.model({"x": (4, 3, 1, 1), "y": (2, 3, 5, 5)}, net.op("Conv", "y", net.norm("x", 3)))
    assert "the weight of Conv" in forward_refusal(model)


def test_refuses_subgraph_consumer() -> None:
    net = Net()
    normed = net.norm("x", 3)
    other = conditional(net, captured=normed)
    model = net.model({"x": (2, 3, 5)}, net.op("Add", net.op("Conv", normed, net.weight(3, 3, 1)), other))
    assert "a subgraph of If" in forward_refusal(model)


def test_folds_where_another_operator_reads_the_shape_alone() -> None:
    net = Net()
    normed = net.norm("x", C)
    convolved = net.op("Conv", normed, net.weight(C, C, 1, 1))
    model = net.model({"x": (2, C, "h", "w")}, net.op("Reshape", convolved, net.op("Shape", normed)))
    folded, _ = fold_and_compare(model, x=noise(2, C, 10, 8))
    assert "BatchNormalization" not in operators(folded)
