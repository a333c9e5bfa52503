"""The float64 arbiter: operators against onnxruntime, datatypes, opsets, and what it refuses."""

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from normcore import execution
from normcore.errors import DeadlineError
from normcore.folding.reference import NotEvaluableError, Reference

Array = NDArray[Any]


def graph_of(
    nodes: list[onnx.NodeProto],
    *,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    weights: dict[str, Array] | None = None,
    output_kind: int | None = None,
) -> ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, None)],
        [helper.make_tensor_value_info("y", output_kind or kind, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def native(model: ModelProto, x: Array) -> Array:
    session = execution.open_session(model.SerializeToString(), threads=1, optimization="none")
    return execution.run(session, {"x": x}, ["y"], deadline_s=10)[0]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_agrees(model: ModelProto, x: Array, *, tolerance: float = 2e-6) -> None:
    expected = native(model, x)
    actual = Reference(model).run({"x": x})["y"]
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


WINDOWS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...] | None]] = {
    "conv1d": ("Conv", {"pads": [2, 0], "dilations": [2]}, (2, 3, 11), (4, 3, 3)),
    "conv2d_asymmetric": ("Conv", {"pads": [1, 0, 2, 1], "strides": [2, 3]}, (2, 3, 9, 13), (4, 3, 3, 2)),
    "conv3d": ("Conv", {"pads": [1] * 6}, (1, 2, 5, 6, 7), (3, 2, 3, 3, 3)),
    "conv_grouped": ("Conv", {"group": 2}, (2, 6, 9, 8), (4, 3, 3, 3)),
    "conv_depthwise": ("Conv", {"group": 6, "auto_pad": "SAME_LOWER", "strides": [2, 2]}, (2, 6, 9, 8), (6, 1, 4, 3)),
    "conv_same_upper": ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (2, 3, 9, 8), (4, 3, 4, 3)),
    "conv_valid": ("Conv", {"auto_pad": "VALID"}, (2, 3, 9, 8), (4, 3, 4, 3)),
    "transposed1d": ("ConvTranspose", {"strides": [3]}, (2, 3, 5), (3, 4, 4)),
    "transposed_grouped": (
        "ConvTranspose",
        {"group": 3, "strides": [2, 3], "pads": [1, 0, 1, 2], "output_padding": [1, 2], "dilations": [2, 1]},
        (2, 6, 5, 4),
        (6, 2, 3, 4),
    ),
    "transposed_shape": ("ConvTranspose", {"strides": [2, 2], "output_shape": [10, 9]}, (1, 3, 5, 4), (3, 2, 3, 3)),
    "transposed_shape_upper": (
        "ConvTranspose",
        {"strides": [2, 2], "output_shape": [10, 8], "auto_pad": "SAME_UPPER"},
        (1, 3, 5, 4),
        (3, 2, 3, 3),
    ),
    "transposed_same_lower": (
        "ConvTranspose",
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        (1, 3, 5, 4),
        (3, 2, 3, 3),
    ),
    "transposed3d": ("ConvTranspose", {"strides": [2, 1, 2]}, (1, 2, 3, 4, 2), (2, 3, 2, 2, 3)),
    "max_pool": ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}, (2, 3, 9, 8), None),
    "max_pool_ceil": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, (2, 3, 8, 9), None),
    "max_pool_dilated": ("MaxPool", {"kernel_shape": [3], "dilations": [2]}, (2, 3, 9), None),
    "max_pool_3d": ("MaxPool", {"kernel_shape": [2, 2, 2]}, (1, 2, 4, 5, 3), None),
    "average_pool": ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0]}, (2, 3, 9, 8), None),
    "average_pool_counts_pads": (
        "AveragePool",
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "strides": [2, 2]},
        (2, 3, 9, 8),
        None,
    ),
    "average_pool_ceil": (
        "AveragePool",
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
        (2, 3, 8, 10),
        None,
    ),
    "average_pool_same": (
        "AveragePool",
        {"kernel_shape": [2, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
        (2, 3, 9, 8),
        None,
    ),
}


@pytest.mark.parametrize(("operator", "attributes", "shape", "weight"), WINDOWS.values(), ids=WINDOWS)
def test_windows_agree_with_onnxruntime(
    operator: str, attributes: dict[str, Any], shape: tuple[int, ...], weight: tuple[int, ...] | None
) -> None:
    weights = {}
    if weight is not None:
        channels = weight[1] * attributes.get("group", 1) if operator == "ConvTranspose" else weight[0]
        weights = {"w": normal(*weight, seed=1), "b": normal(channels, seed=2)}
    node = helper.make_node(operator, ["x", *weights], ["y"], **attributes)
    assert_agrees(graph_of([node], weights=weights), normal(*shape))


def test_max_pool_gives_indices_too() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["pooled", "index"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Cast", ["index"], ["y"], to=TensorProto.FLOAT),
    ]
    assert_agrees(graph_of(nodes), normal(2, 3, 4, 6))


@pytest.mark.parametrize("opset", [7, 9, 12, 15])
def test_batch_normalization_is_in_inference_mode_in_every_opset(opset: int) -> None:
    weights = {name: np.abs(normal(4, seed=seed)) for seed, name in enumerate(("g", "b", "m", "v"))}
    node = helper.make_node("BatchNormalization", ["x", *weights], ["y"], epsilon=1e-3)
    assert_agrees(graph_of([node], opset=opset, weights=weights), 3 + normal(5, 4, 3, 2))


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 1, -1])
def test_softmax_flattened_its_input_before_opset_13(operator: str, opset: int, axis: int | None) -> None:
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    assert_agrees(graph_of([helper.make_node(operator, ["x"], ["y"], **attributes)], opset=opset), normal(2, 3, 4))


OLD: dict[str, tuple[int, onnx.NodeProto, dict[str, Array]]] = {
    "clip_attributes": (10, helper.make_node("Clip", ["x"], ["y"], min=-0.5, max=0.5), {}),
    "squeeze_attribute": (11, helper.make_node("Unsqueeze", ["x"], ["y"], axes=[1]), {}),
    "reduce_attribute": (12, helper.make_node("ReduceSum", ["x"], ["y"], axes=[1]), {}),
    "pad_attribute": (10, helper.make_node("Pad", ["x"], ["y"], pads=[0, 0, 1, 1, 0, 0, 2, 1]), {}),
    "upsample_attribute": (8, helper.make_node("Upsample", ["x"], ["y"], scales=[1.0, 1.0, 2.0, 3.0]), {}),
    "upsample_linear": (
        9,
        helper.make_node("Upsample", ["x", "s"], ["y"], mode="linear"),
        {"s": np.array([1, 1, 2, 2], dtype=np.float32)},
    ),
    "resize_nearest": (
        13,
        helper.make_node(
            "Resize", ["x", "", "s"], ["y"], coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        ),
        {"s": np.array([1, 1, 2, 1.5], dtype=np.float32)},
    ),
    "resize_linear": (
        13,
        helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="linear"),
        {"s": np.array([2, 3, 7, 9])},
    ),
    "erf": (13, helper.make_node("Erf", ["x"], ["y"]), {}),
    "gelu": (20, helper.make_node("Gelu", ["x"], ["y"]), {}),
    "hard_swish": (14, helper.make_node("HardSwish", ["x"], ["y"]), {}),
}


@pytest.mark.parametrize(("opset", "operator", "weights"), OLD.values(), ids=OLD)
def test_operators_keep_the_meaning_of_their_opset(
    opset: int, operator: onnx.NodeProto, weights: dict[str, Array]
) -> None:
    assert_agrees(graph_of([operator], opset=opset, weights=weights), normal(2, 3, 4, 5))


def node(operator: str, *weights: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, ["x", *weights], ["y"], **attributes)


GRID = {"g": np.random.default_rng(1).uniform(-1.2, 1.2, (2, 5, 6, 2)).astype(np.float32)}
OTHERS: dict[str, tuple[int, onnx.NodeProto, dict[str, Array]]] = {
    "lrn": (13, node("LRN", size=3, alpha=0.5), {}),
    "lp_pool": (18, node("LpPool", kernel_shape=[2, 3], strides=[2, 1], pads=[1, 0, 1, 2], p=3), {}),
    "global_lp_pool": (13, node("GlobalLpPool", p=3), {}),
    "mean_variance": (13, node("MeanVarianceNormalization", axes=[2, 3]), {}),
    "lp_normalization": (13, node("LpNormalization", axis=1, p=1), {}),
    "pad_crops": (17, node("Pad", "p"), {"p": np.array([0, 0, -1, 2, 0, 0, 2, -1])}),
    "pad_value": (17, node("Pad", "p", "v"), {"p": np.array([1, 0] * 4), "v": np.array(3, dtype=np.float32)}),
    "pad_reflect": (13, node("Pad", "p", mode="reflect"), {"p": np.array([0, 0, 1, 2, 0, 0, 2, 1])}),
    "pad_edge_axes": (
        18,
        node("Pad", "p", "", "a", mode="edge"),
        {"p": np.array([1, 2, 2, 1]), "a": np.array([2, -1])},
    ),
    "grid_bilinear": (16, node("GridSample", "g", mode="bilinear", padding_mode="reflection"), GRID),
    "grid_nearest": (16, node("GridSample", "g", mode="nearest", align_corners=1), GRID),
    "grid_cubic": (20, node("GridSample", "g", mode="cubic", padding_mode="border"), GRID),
    "resize_cubic": (
        18,
        node("Resize", "", "s", mode="cubic", coordinate_transformation_mode="pytorch_half_pixel"),
        {"s": np.array([1, 1, 2, 1.5], dtype=np.float32)},
    ),
    "resize_axes": (
        18,
        node("Resize", "", "s", mode="linear", axes=[-1, 2]),
        {"s": np.array([1.5, 2], dtype=np.float32)},
    ),
    "resize_axes_sizes": (
        18,
        node("Resize", "", "", "s", mode="cubic", axes=[2, 3], keep_aspect_ratio_policy="not_larger"),
        {"s": np.array([9, 8])},
    ),
    "resize_smoothed": (
        18,
        node("Resize", "", "", "s", mode="linear", axes=[-1], antialias=1),
        {"s": np.array([3])},
    ),
    "resize_10_up": (10, node("Resize", "s"), {"s": np.array([1, 1, 2.5, 2], dtype=np.float32)}),
    "resize_10_down": (10, node("Resize", "s"), {"s": np.array([1, 1, 0.6, 0.5], dtype=np.float32)}),
    "resize_10_linear": (10, node("Resize", "s", mode="linear"), {"s": np.array([1, 1, 0.6, 2], dtype=np.float32)}),
    "instance": (13, node("InstanceNormalization", "g", "b"), {"g": normal(3), "b": normal(3, seed=1)}),
    "layer": (17, node("LayerNormalization", "g", "b", axis=-1, epsilon=1e-3), {"g": normal(5), "b": normal(5)}),
    "group": (21, node("GroupNormalization", "g", "b", num_groups=1), {"g": normal(3), "b": normal(3)}),
    "prelu": (13, node("PRelu", "s"), {"s": normal(3, 1, 1)}),
    "einsum": (13, node("Einsum", "w", equation="nchw,oc->nohw"), {"w": normal(2, 3)}),
    "celu": (12, node("Celu", alpha=0.5), {}),
    "mish": (18, node("Mish"), {}),
    "top_k": (13, helper.make_node("TopK", ["x", "k"], ["y", "i"]), {"k": np.array([2])}),
    "global_max": (13, node("GlobalMaxPool"), {}),
    "cum_sum": (13, node("CumSum", "a"), {"a": np.array(1)}),
}


@pytest.mark.parametrize(("opset", "operator", "weights"), OTHERS.values(), ids=OTHERS)
def test_operators_agree_with_onnxruntime(opset: int, operator: onnx.NodeProto, weights: dict[str, Array]) -> None:
    assert_agrees(graph_of([operator], opset=opset, weights=weights), normal(2, 3, 4, 5), tolerance=5e-6)


@pytest.mark.parametrize("operator", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 7, 5), (2, 3, 4, 6, 5)], ids=["1d", "2d", "3d"])
def test_global_pools_agree_with_onnxruntime(operator: str, shape: tuple[int, ...]) -> None:
    assert_agrees(graph_of([node(operator)], opset=13, weights={}), normal(*shape), tolerance=5e-6)


def test_channels_of_local_response_norm_are_axis_1() -> None:
    x = normal(1, 6, 2, 2)
    y = Reference(graph_of([node("LRN", size=3, alpha=3.0)])).run({"x": x})["y"]
    squares = (x[:, 4:6].astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose(y[:, 5], x[:, 5] / (1 + squares) ** 0.75, rtol=1e-6)


RECURRENT = {"GRU": 3, "LSTM": 4, "RNN": 1}


@pytest.mark.parametrize(("operator", "gates"), RECURRENT.items(), ids=RECURRENT)
def test_recurrent_networks_agree_with_onnxruntime(operator: str, gates: int) -> None:
    weights = {"w": normal(2, gates * 4, 5), "r": normal(2, gates * 4, 4, seed=1), "b": normal(2, gates * 8, seed=2)}
    recurrent = node(operator, *weights, hidden_size=4, direction="bidirectional")
    assert_agrees(graph_of([recurrent], opset=14, weights=weights), normal(6, 2, 5), tolerance=1e-5)


@pytest.mark.parametrize("scale", [np.float32(0.02), np.array([0.02, 0.03, 0.05], np.float32)], ids=["one", "channels"])
def test_integers_are_stored_and_restored(scale: Array) -> None:
    zero = np.full(np.shape(scale), 3, np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1),
    ]
    assert_agrees(graph_of(nodes, opset=13, weights={"s": np.asarray(scale), "z": zero}), normal(2, 3, 4, 5))


def test_blocks_of_quantized_weights_are_restored() -> None:
    stored = np.random.default_rng(0).integers(-8, 8, (6, 4)).astype(np.int8)
    weights = {"q": stored, "s": np.abs(normal(3, 4))}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=2),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    assert_agrees(graph_of(nodes, opset=21, weights=weights), normal(2, 6))


def test_a_residual_network_takes_a_fraction_of_a_second() -> None:
    """ResNet-18's convolutions at 64x64: about a tenth of a second where nothing else runs."""
    nodes, weights, name, channels = [], {}, "x", 3
    for index, (width, count) in enumerate(((64, 5), (128, 4), (256, 4), (512, 4))):
        for step in range(count):
            weight, output = f"w{index}.{step}", f"t{index}.{step}"
            weights[weight] = normal(width, channels, 3, 3) / np.float32(np.sqrt(9 * channels))
            strides = [2, 2] if step == 0 else [1, 1]
            nodes.append(helper.make_node("Conv", [name, weight], [output], pads=[1] * 4, strides=strides))
            name, channels = output, width
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["y"]))
    reference = Reference(graph_of(nodes, weights=weights))
    x = normal(1, 3, 64, 64)
    reference.run({"x": x})
    start = time.thread_time()
    reference.run({"x": x})
    assert time.thread_time() - start < 1


@pytest.mark.parametrize("fixture", ["ocr_cls", "ocr_det"])
def test_real_networks_agree_to_rounding_at_every_normalization(fixture: str, request: pytest.FixtureRequest) -> None:
    model = onnx.load(request.getfixturevalue(fixture))
    names = [node.output[0] for node in model.graph.node if node.op_type == "BatchNormalization"]
    names.append({"ocr_cls": "linear_1.tmp_1", "ocr_det": "p2o.Add.281"}[fixture])  # before softmax, before sigmoid
    x = normal(2, 3, 64, 96)
    exact = Reference(model).run({"x": x}, names)
    model.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = execution.open_session(model.SerializeToString(), threads=2, optimization="none")
    arrays = execution.run(session, {"x": x}, names, deadline_s=30)
    errors = [
        np.abs(array - exact[name]).max() / np.abs(exact[name]).max() for name, array in zip(names, arrays, strict=True)
    ]
    assert max(errors) < 1e-5


def test_rounding_below_float32_is_seen() -> None:
    node = helper.make_node("Add", ["x", "one"], ["y"])
    model = graph_of([node], weights={"one": np.ones(1, dtype=np.float32)})
    y = Reference(model).run({"x": np.array([1e-12])})["y"]
    assert y[0] == 1 + 1e-12


FLOAT_CONSTANTS: dict[str, dict[str, Any]] = {
    "value": {"value": numpy_helper.from_array(np.array([0.1], dtype=np.float32))},
    "value_float": {"value_float": 0.1},
    "value_floats": {"value_floats": [0.1]},
}


@pytest.mark.parametrize("attributes", FLOAT_CONSTANTS.values(), ids=FLOAT_CONSTANTS)
def test_constants_of_every_form_are_double(attributes: dict[str, Any]) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **attributes), helper.make_node("Mul", ["x", "c"], ["y"])]
    y = Reference(graph_of(nodes)).run({"x": np.array([1 + 1e-12])})["y"]
    assert y.reshape(()) == np.float64(np.float32(0.1)) * (1 + 1e-12)


FLOAT_TARGETS: dict[str, list[onnx.NodeProto]] = {
    "cast": [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)],
    "cast_like": [
        helper.make_node("ConstantOfShape", ["empty"], ["zero"]),
        helper.make_node("CastLike", ["x", "zero"], ["y"]),
    ],
    "subgraph": [
        helper.make_node(
            "If",
            ["true"],
            ["y"],
            then_branch=helper.make_graph(
                [helper.make_node("Cast", ["x"], ["out"], to=TensorProto.FLOAT)],
                "then",
                [],
                [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            ),
            else_branch=helper.make_graph(
                [helper.make_node("Neg", ["x"], ["out"])],
                "else",
                [],
                [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            ),
        )
    ],
}


@pytest.mark.parametrize("nodes", FLOAT_TARGETS.values(), ids=FLOAT_TARGETS)
def test_casts_to_floats_stay_double(nodes: list[onnx.NodeProto]) -> None:
    weights = {"empty": np.zeros(0, dtype=np.int64), "true": np.array(True)}
    x = np.array([1 + 1e-12])
    np.testing.assert_array_equal(Reference(graph_of(nodes, weights=weights)).run({"x": x})["y"], x)


def test_integers_stay_integers() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT32)
    y = Reference(graph_of([node], output_kind=TensorProto.INT32)).run({"x": np.array([2.7])})["y"]
    assert y.dtype.name == "int32"
    assert y.tolist() == [2]


def test_half_precision_weights_are_read_exactly() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        weight = normal(3, 4).astype(dtype)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], kind=kind, weights={"w": weight})
        x = normal(2, 3).astype(dtype)
        y = Reference(model).run({"x": x})["y"]
        np.testing.assert_allclose(y, x.astype(np.float64) @ weight.astype(np.float64), rtol=1e-14)


def test_local_functions_are_inlined() -> None:
    weights = {name: np.abs(normal(4, seed=seed)) for seed, name in enumerate(("g", "b", "m", "v"))}
    function = helper.make_function(
        "local",
        "Norm",
        ["a", *weights],
        ["z"],
        [helper.make_node("BatchNormalization", ["a", *weights], ["z"])],
        [helper.make_opsetid("", 12)],
    )
    model = graph_of([helper.make_node("Norm", ["x", *weights], ["y"], domain="local")], opset=12, weights=weights)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    plain = graph_of([helper.make_node("BatchNormalization", ["x", *weights], ["y"])], opset=12, weights=weights)
    x = normal(5, 4, 3)
    np.testing.assert_array_equal(Reference(model).run({"x": x})["y"], Reference(plain).run({"x": x})["y"])


def test_intermediate_tensors_inputs_and_constants_are_returned_by_name() -> None:
    nodes = [helper.make_node("Mul", ["x", "two"], ["middle"]), helper.make_node("Neg", ["middle"], ["y"])]
    reference = Reference(graph_of(nodes, weights={"two": np.array([2], dtype=np.float32)}))
    found = reference.run({"x": np.array([3.0])}, ["middle", "y", "x", "two"])
    assert {name: array.tolist() for name, array in found.items()} == {"middle": [6], "y": [-6], "x": [3], "two": [2]}


def test_a_passed_deadline_stops_the_evaluation() -> None:
    reference = Reference(graph_of([helper.make_node("Neg", ["x"], ["y"])]))
    with pytest.raises(DeadlineError):
        reference.run({"x": np.ones(1)}, deadline=time.monotonic() - 1)


REFUSED: dict[str, tuple[int, onnx.NodeProto, str]] = {
    "random": (17, helper.make_node("RandomNormalLike", ["x"], ["y"]), r"RandomNormalLike \(y\) draws random numbers"),
    "old_scan": (
        8,
        helper.make_node("Scan", ["", "x"], ["y"], num_scan_inputs=1, body=helper.make_graph([], "body", [], [])),
        "Scan of opset 8",
    ),
    "old_opset": (6, helper.make_node("Neg", ["x"], ["y"]), "opset 6 .* oldest one is 7"),
    "unknown": (17, helper.make_node("Nope", ["x"], ["y"]), "Nope"),
}


@pytest.mark.parametrize(("opset", "node", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_evaluated_is_named(opset: int, node: onnx.NodeProto, reason: str) -> None:
    with pytest.raises(NotEvaluableError, match=reason):
        Reference(graph_of([node], opset=opset))


def test_an_operator_that_fails_is_named() -> None:
    model = graph_of([helper.make_node("Add", ["x", "w"], ["y"])], weights={"w": normal(3)})
    with pytest.raises(NotEvaluableError, match=r"operator Add \(y\)"):
        Reference(model).run({"x": np.ones(2)})


def test_the_graph_of_the_caller_is_left_alone(ocr_cls: Path) -> None:
    model = onnx.load(ocr_cls)
    before = model.SerializeToString()
    Reference(model)
    assert model.SerializeToString() == before
