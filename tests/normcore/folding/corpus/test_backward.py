"""Every way backward, as a small graph of random weights whose axes all have different sizes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators, refusal

C = 6
Build = Callable[[Net, str], str]
SPATIAL = {1: (10,), 2: (10, 8), 3: (6, 5, 4)}


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def network(build: Build, *, rank: int = 2, opset: int = 17, channels: int = C, made: int = C) -> ModelProto:
    """Convolution -> what is built -> batch norm."""
    net = Net(opset=opset)
    convolved = net.op("Conv", "x", net.weight(made, 3, *[1] * rank), net.weight(made))
    return net.model({"x": (2, 3, *SPATIAL[rank])}, net.norm(build(net, convolved), channels))


def check(model: ModelProto, *expected: str, rank: int = 2) -> None:
    folded, (entry,) = fold_and_compare(model, x=noise(2, 3, *SPATIAL[rank]))
    assert (entry.status, entry.direction) == ("folded", "backward")
    assert operators(folded) == list(expected)


PASSING: dict[str, tuple[Build, list[str]]] = {
    "identity": (lambda net, name: net.op("Identity", name), ["Identity"]),
    "dropout": (lambda net, name: net.op("Dropout", name), ["Dropout"]),
    "dropout-eval": (
        lambda net, name: net.op("Dropout", name, net.constant(np.float32(0.4)), net.constant(np.array(False))),
        ["Dropout"],
    ),
    "average-pool": (
        lambda net, name: net.op("AveragePool", name, kernel_shape=[2, 2], strides=[2, 1]),
        ["AveragePool"],
    ),
    "average-pool-padded-uncounted": (
        lambda net, name: net.op("AveragePool", name, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        ["AveragePool"],
    ),
    "average-pool-ceil": (
        lambda net, name: net.op("AveragePool", name, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        ["AveragePool"],
    ),
    "global-average-pool": (lambda net, name: net.op("GlobalAveragePool", name), ["GlobalAveragePool"]),
    "reduce-mean": (lambda net, name: net.op("ReduceMean", name, axes=[2, -1], keepdims=0), ["ReduceMean"]),
    "resize-nearest": (
        lambda net, name: net.op("Resize", name, "", net.constant(np.array([1, 1, 2, 1.5], np.float32))),
        ["Resize"],
    ),
    "resize-linear": (
        lambda net, name: net.op("Resize", name, "", "", ints(net, 2, C, 13, 11), mode="linear"),
        ["Resize"],
    ),
    "resize-cubic": (
        lambda net, name: net.op("Resize", name, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="cubic"),
        ["Resize"],
    ),
    "slice-space": (lambda net, name: net.op("Slice", name, ints(net, 1), ints(net, -1), ints(net, 2)), ["Slice"]),
    "pad-edge": (lambda net, name: net.op("Pad", name, ints(net, 0, 0, 1, 2, 0, 0, 3, 0), mode="edge"), ["Pad"]),
    "pad-reflect": (lambda net, name: net.op("Pad", name, ints(net, 0, 0, 1, 2, 0, 0, 3, 0), mode="reflect"), ["Pad"]),
    "space-to-batch-transpose": (
        lambda net, name: net.op("Transpose", net.op("Transpose", name, perm=[3, 0, 1, 2]), perm=[1, 2, 0, 3]),
        ["Transpose", "Transpose"],
    ),
    "flatten-space": (lambda net, name: net.op("Reshape", name, ints(net, 0, 0, -1)), ["Reshape"]),
    "squeeze-unsqueeze": (
        lambda net, name: net.op("Squeeze", net.op("Unsqueeze", name, ints(net, 1, -1)), ints(net, 1, -1)),
        ["Unsqueeze", "Squeeze"],
    ),
    "concat-space": (
        lambda net, name: net.op("Concat", name, net.op("Conv", "x", net.weight(C, 3, 1, 1)), axis=2),
        ["Conv", "Concat"],
    ),
    "add-of-branches": (
        lambda net, name: net.op("Add", name, net.op("Conv", net.op("Abs", "x"), net.weight(C, 3, 1, 1))),
        ["Abs", "Conv", "Add"],
    ),
    "sub-of-branches": (
        lambda net, name: net.op("Sub", name, net.op("Conv", "x", net.weight(C, 3, 1, 1))),
        ["Conv", "Sub"],
    ),
    "sum-of-three": (
        lambda net, name: net.op(
            "Sum", name, *(net.op("Conv", net.op(operator, "x"), net.weight(C, 3, 1, 1)) for operator in ("Abs", "Neg"))
        ),
        ["Abs", "Conv", "Neg", "Conv", "Sum"],
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_folds_through(name: str) -> None:
    build, between = PASSING[name]
    check(network(build), "Conv", *between)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("operator", ["AveragePool", "GlobalAveragePool", "Identity"])
def test_folds_through_in_other_ranks(operator: str, rank: int) -> None:
    attributes: dict[str, Any] = {"kernel_shape": [2] * rank} if operator == "AveragePool" else {}
    check(network(lambda net, name: net.op(operator, name, **attributes), rank=rank), "Conv", operator, rank=rank)


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_folds_through_depth_to_space(mode: str) -> None:
    model = network(lambda net, name: net.op("DepthToSpace", name, blocksize=2, mode=mode), made=4 * C)
    check(model, "Conv", "DepthToSpace")


def test_folds_through_concat_of_channels() -> None:
    def build(net: Net, name: str) -> str:
        other = net.op("ConvTranspose", "x", net.weight(3, 5, 1, 1))
        return net.op("Concat", name, other, net.op("Conv", "x", net.weight(7, 3, 1, 1)), axis=1)

    check(network(build, channels=C + 12), "Conv", "ConvTranspose", "Conv", "Concat")


def test_refuses_concat_with_one_branch_used_elsewhere() -> None:
    net = Net()
    first, second = (net.op("Conv", "x", net.weight(C, 3, 1, 1)) for _ in range(2))
    output = net.norm(net.op("Concat", first, second, axis=1), 2 * C)
    model = net.model({"x": (2, 3, 10, 8)}, output, net.op("Relu", second))
    assert "second consumer Relu" in refusal(model)


def test_refuses_concat_with_graph_input() -> None:
    net = Net()
    joined = net.op("Concat", net.op("Conv", "x", net.weight(C, 3, 1, 1)), "x", axis=1)
    assert "graph input 'x'" in refusal(net.model({"x": (2, 3, 10, 8)}, net.norm(joined, C + 3)))


@pytest.mark.parametrize("swapped", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("shape", [(C, 1, 1), (1, C, 1, 1), (1,)], ids=str)
def test_folds_constants_in_either_order(operator: str, shape: tuple[int, ...], swapped: bool) -> None:
    def build(net: Net, name: str) -> str:
        operands = [name, net.weight(*shape)]
        return net.op(operator, *(operands[::-1] if swapped else operands))

    model = network(build)
    if operator == "Div" and swapped:
        assert "divides by what is computed" in refusal(model)
    else:
        check(model, "Conv")


@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub", "Div"])
def test_refuses_constant_along_the_last_axis(operator: str) -> None:
    """`Conv * (C,)` hits the width, even where that has as many elements as there are channels."""
    net = Net()
    convolved = net.op("Conv", "x", net.weight(8, 3, 1, 1))
    model = net.model({"x": (2, 3, 10, 8)}, net.norm(net.op(operator, convolved, net.weight(8)), 8))
    assert "another axis than the channels" in refusal(model)


def test_folds_caffe_scale_without_batch_norm() -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(C, 3, 3, 3))
    scaled = net.op("Add", net.op("Mul", convolved, net.weight(1, C, 1, 1)), net.weight(1, C, 1, 1))
    folded, (entry,) = fold_and_compare(net.model({"x": (2, 3, 10, 8)}, scaled), x=noise(2, 3, 10, 8))
    assert operators(folded) == ["Conv"]
    assert (entry.operator, entry.output) == ("Mul -> Add", scaled)


def test_folds_decomposed_batch_norm() -> None:
    """(x - mean) / sqrt(var + eps) * weight + bias, the square root and all."""
    net = Net()
    vector = (1, C, 1, 1)
    convolved = net.op("Conv", "x", net.weight(C, 3, 3, 3))
    var = net.constant(np.abs(noise(*vector)) + np.float32(0.1))
    deviation = net.op("Sqrt", net.op("Add", var, net.constant(np.float32(1e-5))))
    standard = net.op("Div", net.op("Sub", convolved, net.weight(*vector)), deviation)
    output = net.op("Add", net.op("Mul", standard, net.weight(*vector)), net.weight(*vector))
    folded, _ = fold_and_compare(net.model({"x": (2, 3, 10, 8)}, output), x=noise(2, 3, 10, 8))
    assert operators(folded) == ["Conv"]


def test_keeps_bias_and_factor_that_are_no_normalization() -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(C, 3, 3, 3))
    output = net.op("Mul", net.op("Add", convolved, net.weight(C, 1, 1)), net.constant(np.float32(0.5)))
    folded, entries = fold_and_compare(net.model({"x": (2, 3, 10, 8)}, output), x=noise(2, 3, 10, 8))
    assert operators(folded) == ["Conv", "Add", "Mul"]
    assert entries == ()


@pytest.mark.parametrize("operator", ["MaxPool", "GlobalMaxPool", "ReduceMax", "Relu", "LeakyRelu"])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_folds_positive_scales_through_what_keeps_order(operator: str, sign: int) -> None:
    known: dict[str, dict[str, Any]] = {
        "MaxPool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
        "ReduceMax": {"axes": [3], "keepdims": 0},
    }
    attributes = known.get(operator, {})
    net = Net()
    pooled = net.op(operator, net.op("Conv", "x", net.weight(C, 3, 3, 3)), **attributes)
    vectors = [sign * (np.abs(noise(C)) + np.float32(0.1)), noise(C), noise(C), np.abs(noise(C)) + np.float32(0.1)]
    if "elu" in operator:
        vectors[1:3] = [np.zeros(C, np.float32)] * 2
    output = net.op("BatchNormalization", pooled, *map(net.constant, vectors))
    model = net.model({"x": (2, 3, 10, 8)}, output)
    if sign > 0:
        folded, _ = fold_and_compare(model, x=noise(2, 3, 10, 8))
        assert operators(folded) == ["Conv", operator]
    else:
        assert ("not keep the order" if "Max" in operator else "not linear") in refusal(model)


def test_refuses_max_pool_with_indices() -> None:
    net = Net()
    pooled = net.op("MaxPool", net.op("Conv", "x", net.weight(C, 3, 3, 3)), kernel_shape=[2, 2])
    net.nodes[-1].output.append("indices")
    parameters = [net.constant(np.ones(C, np.float32)) for _ in range(4)]
    model = net.model({"x": (2, 3, 10, 8)}, net.op("BatchNormalization", pooled, *parameters))
    assert "also gives indices" in refusal(model)


def test_refuses_convolution_then_activation_then_norm() -> None:
    """torchcrepe: names, order and shapes all say fold."""
    assert "Relu 'relu_1', which is not linear" in refusal(network(lambda net, name: net.op("Relu", name)))


def test_leaves_shift_behind_counted_zeros() -> None:
    model = network(
        lambda net, name: net.op("AveragePool", name, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    )
    folded, (entry,) = fold_and_compare(model, x=noise(2, 3, 10, 8))
    assert operators(folded) == ["Conv", "AveragePool", "Add"]
    assert (entry.direction, entry.option) == ("backward", "offset")


REFUSED: dict[str, tuple[Build, str]] = {
    "dropout-training": (
        lambda net, name: net.op("Dropout", name, net.constant(np.float32(0.4)), net.constant(np.array(True))),
        "is in training mode",
    ),
    "resize-channels": (
        lambda net, name: net.op("Resize", name, "", net.constant(np.array([1, 2, 1, 1], np.float32))),
        "may resize the axis of the channels",
    ),
    "resize-crop": (
        lambda net, name: net.op(
            "Resize",
            name,
            net.constant(np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32)),
            "",
            ints(net, 2, C, 5, 5),
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
        "fills in a constant",
    ),
    "pad-ones": (
        lambda net, name: net.op("Pad", name, ints(net, 0, 0, 1, 1, 0, 0, 1, 1), net.constant(np.float32(1))),
        "pads with 1",
    ),
    "pad-channels": (lambda net, name: net.op("Pad", name, ints(net, 0, 1, 0, 0, 0, 1, 0, 0)), "adds channels"),
    "transpose-other-axis": (lambda net, name: net.op("Transpose", name, perm=[0, 2, 1, 3]), "channels are on axis 2"),
    "reduce-channels": (
        lambda net, name: net.op("Unsqueeze", net.op("ReduceMean", name, axes=[1], keepdims=0), ints(net, 1)),
        "makes the axis of the channels",
    ),
    "merged-channels": (
        lambda net, name: net.op("Reshape", name, ints(net, 2, 60, 8)),
        "varies along more than one part",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    build, reason = REFUSED[name]
    channels = {"resize-channels": 2 * C, "pad-channels": C + 2, "transpose-other-axis": 10, "reduce-channels": 1}
    channels["merged-channels"] = 60
    model = network(build, channels=channels.get(name, C))
    assert reason in refusal(model)


def linear(build: Callable[[Net, str], str], channels: int, *, shape: tuple[int, ...] = (4, 5, 3)) -> ModelProto:
    net = Net()
    return net.model({"x": shape}, net.norm(build(net, net.op("MatMul", "x", net.weight(3, C))), channels))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("moves", ["transpose", "flatten", "reshape"])
def test_folds_linear_behind_what_moves_its_axis(moves: str, has_bias: bool) -> None:
    """(N, L, C) is moved to (N, C, L), or flattened to (N L, C) as LeViT does."""

    def build(net: Net, name: str) -> str:
        name = net.op("Add", name, net.weight(C)) if has_bias else name
        if moves == "transpose":
            return net.op("Transpose", name, perm=[0, 2, 1])
        return net.op("Flatten", name, axis=2) if moves == "flatten" else net.op("Reshape", name, ints(net, -1, C))

    folded, (entry,) = fold_and_compare(linear(build, C), x=noise(4, 5, 3))
    assert operators(folded) == [
        "MatMul",
        "Add",
        {"transpose": "Transpose", "flatten": "Flatten"}.get(moves, "Reshape"),
    ]
    assert entry.rule == "matmul"


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, C, 3)], ids=["distinct", "coincident"])
def test_refuses_linear_before_norm_of_another_axis(shape: tuple[int, ...]) -> None:
    """(N, L, C) with L == C: the shapes agree, the axes do not; onnxruntime's own fusion gets it wrong."""
    model = linear(lambda net, name: name, shape[1], shape=shape)
    assert "the same only at rank 2" in refusal(model)


def test_folds_linear_before_uniform_norm_of_another_axis() -> None:
    net = Net()
    parameters = [net.constant(np.full(5, value, np.float32)) for value in (-1.5, 0.25, 3, 2)]
    output = net.op("BatchNormalization", net.op("MatMul", "x", net.weight(3, C)), *parameters)
    folded, _ = fold_and_compare(net.model({"x": (4, 5, 3)}, output), x=noise(4, 5, 3))
    assert operators(folded) == ["MatMul", "Add"]


def test_folds_linear_that_becomes_an_image() -> None:
    """A generator's first layer: the map of each channel repeats over its positions."""
    net = Net()
    image = net.op("Reshape", net.op("Gemm", "x", net.weight(3, C * 20)), ints(net, -1, C, 4, 5))
    folded, _ = fold_and_compare(net.model({"x": ("N", 3)}, net.norm(image, C)), x=noise(7, 3))
    assert operators(folded) == ["Gemm", "Reshape"]


def test_refuses_reshape_that_mixes_axes_of_equal_sizes() -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(C, 3, 1, 1))
    mixed = net.op("Reshape", convolved, ints(net, 2, 4, C, C))
    assert "splits or merges" in refusal(net.model({"x": (2, 3, C, 4)}, net.norm(mixed, 4)))


def test_folds_slice_of_channels() -> None:
    model = network(
        lambda net, name: net.op("Slice", name, ints(net, 1), ints(net, 6), ints(net, 1), ints(net, 2)), channels=3
    )
    check(model, "Conv", "Slice")


def test_folds_one_part_of_split_channels() -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(C, 3, 1, 1))
    net.op("Split", convolved, ints(net, 2, 4), output="first", axis=1)
    net.nodes[-1].output.append("second")
    output = net.op("Concat", net.norm("first", 2), net.op("Tanh", "second"), axis=1)
    folded, _ = fold_and_compare(net.model({"x": (2, 3, 10, 8)}, output), x=noise(2, 3, 10, 8))
    assert operators(folded) == ["Conv", "Split", "Tanh", "Concat"]


def test_folds_long_mixed_chain() -> None:
    def build(net: Net, name: str) -> str:
        name = net.norm(net.op("Identity", name), C)
        name = net.op("Div", net.op("AveragePool", name, kernel_shape=[2, 2]), net.weight(C, 1, 1))
        return net.op("Transpose", net.op("Transpose", net.norm(name, C), perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])

    folded, entries = fold_and_compare(network(build), x=noise(2, 3, 10, 8), tolerance=1e-5)
    assert "BatchNormalization" not in operators(folded)
    assert "Div" not in operators(folded)
    assert {entry.status for entry in entries} == {"folded"}


def test_folds_levit_which_reads_the_shape_of_what_it_normalizes() -> None:
    """flatten(0, 1) -> norm -> reshape_as: who asks for a shape alone sees no difference."""
    net = Net()
    product = net.op("MatMul", "x", net.weight(3, C))
    normed = net.norm(net.op("Flatten", product, axis=2), C)
    output = net.op("Reshape", normed, net.op("Shape", product))
    folded, _ = fold_and_compare(net.model({"x": ("n", 5, 3)}, output), x=noise(4, 5, 3))
    assert sorted(operators(folded)) == ["Add", "Flatten", "MatMul", "Reshape", "Shape"]


def test_folds_linear_that_becomes_an_image_of_computed_size() -> None:
    """As torch exports Unflatten: the batch is read from the input, the rest is constant."""
    net = Net()
    flat = net.op("Gemm", "x", net.weight(3, C * 20))
    batch = net.op("Slice", net.op("Shape", flat), ints(net, 0), ints(net, 1))
    image = net.op("Reshape", flat, net.op("Concat", batch, ints(net, C, 4, 5), axis=0))
    folded, _ = fold_and_compare(net.model({"x": ("n", 3)}, net.norm(image, C)), x=noise(7, 3))
    assert "BatchNormalization" not in operators(folded)


def test_refuses_reshape_of_two_computed_sizes() -> None:
    net = Net()
    flat = net.op("Gemm", "x", net.weight(3, C * 20))
    sizes = net.op("Slice", net.op("Shape", "y"), ints(net, 0), ints(net, 2))
    image = net.op("Reshape", flat, net.op("Concat", sizes, ints(net, 4, 5), axis=0))
    model = net.model({"x": ("n", 3), "y": ("n", "c")}, net.norm(image, C))
    assert "splits or merges" in refusal(model) or "free size" in refusal(model)


WIDE = [[TensorProto.FLOAT], [TensorProto.DOUBLE, TensorProto.FLOAT]]


@pytest.mark.parametrize("targets", WIDE, ids=["same", "through-double"])
def test_folds_through_casts_that_keep_every_number(targets: list[int]) -> None:
    net = Net()
    name = net.op("Conv", "x", net.weight(4, 3, 3, 3))
    for target in targets:
        name = net.op("Cast", name, to=target)
    folded, _ = fold_and_compare(net.model({"x": (2, 3, 8, 7)}, net.norm(name, 4)), x=noise(2, 3, 8, 7))
    assert operators(folded) == ["Conv", *["Cast"] * len(targets)]


@pytest.mark.parametrize("target", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT32])
def test_refuses_casts_that_round(target: int) -> None:
    net = Net()
    rounded = net.op("Cast", net.op("Conv", "x", net.weight(4, 3, 3, 3)), to=target)
    model = net.model({"x": (2, 3, 8, 7)}, net.norm(net.op("Cast", rounded, to=TensorProto.FLOAT), 4))
    assert "turns" in refusal(model)
