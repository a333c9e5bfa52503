"""What other tools get wrong, in both directions: float16, sharing, locked norms, free shapes; and the whole proof."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from normcore.checkpoints.onnx import GraphLimits
from normcore.folding.fold import fold_checkpoint, fold_onnx
from normcore.folding.onnx.options import FoldOptions
from normcore.folding.verify import ProbeOptions
from tests.normcore.folding.builder import Net, fold_and_compare, forward_refusal, noise, operators, reasons, refusal

C = 6


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


BEFORE: dict[str, Callable[[Net], str]] = {
    "average-pool": lambda net: net.op("AveragePool", net.op("Conv", "x", net.weight(C, C, 1, 1)), kernel_shape=[2, 2]),
    "resize": lambda net: net.op(
        "Resize",
        net.op("Conv", "x", net.weight(C, C, 1, 1)),
        "",
        net.constant(np.array([1, 1, 2, 2], np.float32)),
        mode="linear",
    ),
    "sum": lambda net: net.op(
        "Add", net.op("Conv", "x", net.weight(C, C, 1, 1)), net.op("Conv", net.op("Abs", "x"), net.weight(C, C, 1, 1))
    ),
    "product": lambda net: net.op(
        "Transpose",
        net.op("MatMul", net.op("Transpose", "x", perm=[0, 2, 3, 1]), net.weight(C, C)),
        perm=[0, 3, 1, 2],
    ),
}


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=["fp16", "bf16", "fp32", "fp64"]
)
@pytest.mark.parametrize("name", BEFORE)
def test_float16_makes_no_new_tensor_that_could_overflow(name: str, dtype: Any) -> None:
    """The tensor before a mean, a sum or a bias may be larger than what comes behind; the others have room."""
    net = Net(dtype=dtype)
    model = net.model({"x": (2, C, 10, 8)}, net.norm(BEFORE[name](net), C))
    if dtype == np.float16:
        assert "overflow" in refusal(model)
    else:
        assert "BatchNormalization" not in operators(fold_onnx(model)[0])


def test_float16_overflows_in_truth_where_the_fold_is_refused() -> None:
    """The refused fold, done by hand, makes infinity of a network whose outputs are small."""
    x = np.array([6e4, -6e4], np.float16).reshape(1, 1, 1, 2)
    with np.errstate(over="ignore"):
        scaled = x * np.float16(2)
    assert np.isinf(scaled).all()
    assert np.isfinite(np.float16(2) * x.mean(axis=-1)).all()


@pytest.mark.parametrize("option", ["offset", "pad", "map"])
def test_float16_refuses_every_way_around_zero_padding(option: Any) -> None:
    net = Net(dtype=np.float16)
    model = net.model({"x": (2, C, 10, 8)}, net.op("Conv", net.norm("x", C), net.weight(4, C, 3, 3), pads=[1, 1, 1, 1]))
    assert "float16" in forward_refusal(model, zero_padding=option)


def test_float16_forward_weight_that_overflows() -> None:
    net = Net(dtype=np.float16)
    scale = net.constant(np.full(C, 300, np.float16))
    zeros, ones = net.constant(np.zeros(C, np.float16)), net.constant(np.ones(C, np.float16))
    normed = net.op("BatchNormalization", "x", scale, zeros, zeros, ones)
    weight = net.constant(np.full((4, C, 1, 1), 600, np.float16))
    assert "more than float16 can hold" in forward_refusal(
        net.model({"x": (2, C, 5, 4)}, net.op("Conv", normed, weight))
    )


def test_forward_clones_a_weight_that_another_convolution_uses() -> None:
    net = Net()
    weight = net.weight(4, C, 1, 1)
    normed, plain = net.op("Conv", net.norm("x", C), weight), net.op("Conv", "x", weight)
    folded, _ = fold_and_compare(net.model({"x": (2, C, 5, 4)}, net.op("Mul", normed, plain)), x=noise(2, C, 5, 4))
    assert operators(folded) == ["Conv", "Conv", "Mul"]
    assert len(folded.graph.initializer) == 3


def test_forward_clones_a_weight_that_two_of_its_consumers_share() -> None:
    net = Net()
    weight, bias = net.weight(4, C, 1, 1), net.weight(4)
    normed = net.norm("x", C)
    parts = [net.op("Conv", normed, weight, bias) for _ in range(2)]
    folded, _ = fold_and_compare(net.model({"x": (2, C, 5, 4)}, net.op("Mul", *parts)), x=noise(2, C, 5, 4))
    assert operators(folded) == ["Conv", "Conv", "Mul"]


def test_excluded_norm_stays_as_it_is_whoever_is_beside_it() -> None:
    net = Net()
    first = net.norm("x", C)
    second = net.norm(first, C)
    model = net.model({"x": (2, C, 5, 4)}, net.op("Conv", net.norm(second, C), net.weight(4, C, 1, 1)))
    folded, entries = fold_onnx(model, exclude=[second])
    assert [entry.status for entry in entries] == ["kept", "kept", "folded"]
    assert entries[1].reason == "excluded by the caller"
    kept = {node.output[0]: node for node in folded.graph.node}
    assert kept[second] == next(node for node in model.graph.node if node.output[0] == second)


def test_square_sizes_hide_nothing_from_a_dense_layer() -> None:
    """(N, C, L) -> MatMul over L, with L == C: forward, the channels of the norm are not the axis that is summed."""
    net = Net()
    model = net.model({"x": (2, C, C)}, net.op("MatMul", net.norm("x", C), net.weight(C, C)))
    assert "channels are on axis 1, those of MatMul 'matmul_1' on axis 2" in forward_refusal(model)


def test_flatten_of_free_size_is_refused() -> None:
    net = Net()
    flat = net.op("Flatten", net.norm("x", C))
    model = net.model({"x": (2, C, "h", 4)}, net.op("MatMul", flat, net.weight(C * 20, 5)))
    assert "merges the channels with an axis of free size" in forward_refusal(model)


def test_names_that_stay_mean_the_same_tensor() -> None:
    """What changes between convolution and norm, or norm and convolution, gets a fresh name."""
    net = Net()
    pooled = net.op("AveragePool", net.op("Conv", "x", net.weight(C, C, 3, 3)), kernel_shape=[2, 2])
    hidden = net.op("Tanh", net.norm(pooled, C))
    view = net.op("Identity", net.norm(hidden, C))
    model = net.model({"x": (2, C, 10, 8)}, net.op("Conv", view, net.weight(4, C, 1, 1)))
    folded, _ = fold_onnx(model)
    common = {name for node in model.graph.node for name in node.output}
    common &= {name for node in folded.graph.node for name in node.output}
    assert common == {hidden, model.graph.output[0].name, model.graph.node[2].output[0]}
    assert fold_and_compare(shown(model, common), x=noise(2, C, 10, 8))


def shown(model: ModelProto, names: set[str]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    present = {info.name for info in copy.graph.output}
    inferred = onnx.shape_inference.infer_shapes(model)
    copy.graph.output.extend(info for info in inferred.graph.value_info if info.name in names - present)
    return copy


def everything() -> ModelProto:
    """Every direction at once."""
    net = Net()
    first = net.norm(net.op("AveragePool", net.op("Conv", "x", net.weight(C, 3, 3, 3)), kernel_shape=[2, 2]), C)
    hidden = net.op("Tanh", first)
    block = net.op(
        "Add",
        net.norm(net.op("Conv", hidden, net.weight(C, C, 3, 3), pads=[1, 1, 1, 1]), C),
        net.norm(hidden, C),
    )
    active = net.op("Tanh", block)
    padded = net.op("Conv", net.norm(active, C), net.weight(C, C, 3, 3, scale=0.2), pads=[1, 1, 1, 1])
    pooled = net.op("Flatten", net.op("GlobalAveragePool", net.norm(net.op("Tanh", padded), C)))
    return net.model({"x": ("n", 3, 12, 9)}, net.op("Gemm", pooled, net.weight(C, 5)))


@pytest.mark.parametrize(
    "options",
    [{}, {"zero_padding": "pad"}, {"zero_padding": "map"}, {"zero_padding": "refuse", "affine": True}],
    ids=str,
)
def test_everything_is_proven(tmp_path: Path, options: FoldOptions) -> None:
    source = tmp_path / "source.onnx"
    onnx.save(everything(), source)
    report = fold_checkpoint(
        source,
        tmp_path / "folded.onnx",
        limits=GraphLimits(),
        verify=ProbeOptions(count=4, deadline_s=60),
        **options,
    )
    assert report.certificate is not None
    assert report.certificate.verdict == "equivalent"
    assert {entry.status for entry in report.entries} == {"folded"}
    assert "BatchNormalization" not in operators(onnx.load(tmp_path / "folded.onnx"))


def test_constant_that_widens_one_channel_is_no_map_even_where_all_are_equal() -> None:
    """The same number for every channel: no channel tells that there were fewer."""
    net = Net()
    wide = net.op("Mul", net.op("Conv", "x", net.weight(1, 3, 1, 1)), net.constant(np.full((C, 1, 1), 2, np.float32)))
    parameters = [net.constant(np.full(C, value, np.float32)) for value in (3, 1, 2, 4)]
    model = net.model({"x": (2, 3, 5, 4)}, net.op("BatchNormalization", wide, *parameters))
    assert "may make 6 channels of one" in refusal(model)


def test_old_elementwise_operators_are_left_alone() -> None:
    """Before opset 7 they broadcast by attributes, and along the first axes."""
    net = Net(opset=6)
    output = net.op("Mul", net.op("MatMul", "x", net.weight(3, C)), net.weight(C), broadcast=1, axis=0)
    folded, entries = fold_onnx(net.model({"x": (C, 3)}, output))
    assert operators(folded) == ["MatMul", "Mul"]
    assert entries == ()


@pytest.mark.parametrize("is_per_channel", [False, True], ids=["per-tensor", "per-channel"])
def test_quantized_weight_stays_as_it_is(is_per_channel: bool) -> None:
    """A scale folded into eight-bit numbers would round them again."""
    net = Net()
    quantized = net.constant(net.generator.integers(-127, 128, (C, 3, 3, 3)).astype(np.int8))
    shape = (C,) if is_per_channel else ()
    steps = net.constant(np.full(shape, 0.01, np.float32)), net.constant(np.zeros(shape, np.int8))
    weight = net.op("DequantizeLinear", quantized, *steps, axis=0)
    model = net.model({"x": (2, 3, 9, 8)}, net.norm(net.op("Conv", "x", weight), C))
    assert "is computed at run time by DequantizeLinear" in refusal(model)


def test_quantized_convolution_takes_no_norm() -> None:
    net = Net()
    weight = net.constant(net.generator.integers(-127, 128, (C, 3, 3, 3)).astype(np.int8))
    step = net.constant(np.float32(0.1)), net.constant(np.int8(0))
    convolved = net.op("QLinearConv", net.op("QuantizeLinear", "x", *step), *step, weight, *step, *step)
    model = net.model({"x": (2, 3, 9, 8)}, net.norm(net.op("DequantizeLinear", convolved, *step), C))
    assert "its input is produced by DequantizeLinear" in refusal(model)


@pytest.mark.parametrize("operator", ["Mul", "Add"])
@pytest.mark.parametrize("linear", ["Gemm", "MatMul"])
def test_constant_of_a_higher_rank_moves_the_channels(linear: str, operator: str) -> None:
    """(6, 6) * (1, 1, 1) is (1, 6, 6): axis 1 were rows before, and the columns agree in number."""
    net = Net()
    wide = net.op(operator, net.op(linear, "x", net.weight(3, C)), net.constant(np.full((1, 1, 1), 2, np.float32)))
    assert "of one of a lower rank" in refusal(net.model({"x": (C, 3)}, net.norm(wide, C)))


@pytest.mark.parametrize("operator", ["LeakyRelu", "PRelu"])
def test_float16_scales_nothing_on_the_other_side_of_a_slope(operator: str) -> None:
    """-4e4 * 0.01 * 2 is small, and -4e4 * 2 is infinite."""
    for dtype in (np.float16, np.float32):
        net = Net(dtype=dtype)
        slope = [net.constant(np.full(1, 0.01, dtype))] if operator == "PRelu" else []
        bent = net.op(operator, net.op("Conv", "x", net.weight(C, 3, 1, 1)), *slope)
        vectors = [net.constant(np.full(C, value, dtype)) for value in (2, 0, 0, 1)]
        model = net.model({"x": (2, 3, 5, 4)}, net.op("BatchNormalization", bent, *vectors))
        if dtype == np.float32:
            assert operators(fold_onnx(model)[0]) == ["Conv", operator]
        else:
            assert "one side of" in refusal(model)


def test_float16_multiplies_nothing_behind_a_slope() -> None:
    net = Net(dtype=np.float16)
    scaled = net.op("Mul", "x", net.constant(np.full((C, 1, 1), 1e-3, np.float16)))
    bent = net.op("PRelu", scaled, net.constant(np.full(1, 8, np.float16)))
    model = net.model({"x": (2, C, 5, 4)}, net.op("Conv", bent, net.weight(4, C, 1, 1)))
    assert fold_onnx(model)[0] == model


def test_float16_multiplies_nothing_behind_what_overshoots() -> None:
    for dtype in (np.float16, np.float32):
        net = Net(dtype=dtype)
        scaled = net.op("Mul", "x", net.constant(np.linspace(1, 2, C).reshape(C, 1, 1).astype(dtype)))
        sizes = net.constant(np.array([1, 1, 2, 2], np.float32))
        large = net.op("Resize", scaled, "", sizes, mode="cubic")
        model = net.model({"x": (2, C, 5, 4)}, net.op("Conv", large, net.weight(4, C, 1, 1)))
        assert operators(fold_onnx(model)[0]) == (["Mul"] if dtype == np.float16 else []) + ["Resize", "Conv"]


EMPTY: dict[str, Callable[[Net], str]] = {
    "conv": lambda net: net.op("Conv", "x", net.weight(0, 3, 1, 1)),
    "transposed": lambda net: net.op("ConvTranspose", "x", net.weight(3, 0, 1, 1)),
    "transposed-groups": lambda net: net.op("ConvTranspose", "x", net.weight(3, 0, 1, 1), group=3),
    "sum": lambda net: net.op(
        "Add", net.op("Conv", "x", net.weight(0, 3, 1, 1)), net.op("Conv", "x", net.weight(0, 3, 1, 1))
    ),
    "slice": lambda net: net.op(
        "Slice", net.op("Conv", "x", net.weight(C, 3, 1, 1)), *(ints(net, each) for each in (C, C, 1))
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_channels_are_left_alone(name: str) -> None:
    net = Net()
    assert "there are no channels" in refusal(net.model({"x": (2, 3, 5, 4)}, net.norm(EMPTY[name](net), 0)))


def test_part_without_channels_is_left_alone() -> None:
    net = Net()
    joined = net.op("Concat", *(net.op("Conv", "x", net.weight(size, 3, 1, 1)) for size in (C, 0)), axis=1)
    assert "there are no channels" in refusal(net.model({"x": (2, 3, 5, 4)}, net.norm(joined, C)))


def test_weight_over_no_features_is_left_alone() -> None:
    net = Net()
    assert "is empty" in refusal(net.model({"x": (5, 0)}, net.norm(net.op("MatMul", "x", net.weight(0, C)), C)))


def test_digits_that_a_cast_would_drop_are_used_before() -> None:
    """1e9 + 0.3 minus 1e9 is 0.3, and 1e9 + 0.3 in float32 is 1e9: the norm of float64 comes first."""
    net = Net(dtype=np.float64)
    vectors = [net.constant(np.full(3, value, np.float64)) for value in (1, 0, 1e9, 1)]
    narrow = net.op("Cast", net.op("BatchNormalization", "x", *vectors), to=TensorProto.FLOAT)
    weight = net.constant(noise(4, 3, 1, 1))
    model = net.model({"x": (2, 3, 5, 4)}, net.op("Cast", net.op("Conv", narrow, weight), to=TensorProto.DOUBLE))
    assert "reads less than the float64" in forward_refusal(model)


def test_norm_of_vectors_is_left_alone() -> None:
    """Of rank 1, a tensor has one channel and no axis for it."""
    for options in ({}, {"affine": True}):
        net = Net()
        model = net.model({"x": (5,)}, net.norm(net.op("Add", "x", net.weight(1)), 1))
        assert "rank 1 has no axis 1" in reasons(model, **cast("FoldOptions", options))[0]


def test_reshaped_summand_of_one_channel_that_a_sum_repeats_is_left_alone() -> None:
    net = Net()
    one = net.op("Reshape", net.op("Gemm", "x", net.weight(5, 12)), ints(net, 2, 1, 3, 4))
    three = net.op("Conv", net.op("Reshape", "x", ints(net, 2, 5, 1, 1)), net.weight(3, 5, 1, 1))
    parameters = [net.constant(np.full(3, value, np.float32)) for value in (3, 1, 2, 4)]
    model = net.model({"x": (2, 5)}, net.op("BatchNormalization", net.op("Add", one, three), *parameters))
    assert "merges 1 channels, which a sum makes 3" in refusal(model)
