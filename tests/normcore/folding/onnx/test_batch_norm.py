import ml_dtypes
import numpy as np
import pytest
from onnx import ModelProto, helper

from normcore.folding.fold import fold_onnx
from tests.normcore.folding.builder import Net, evaluate, fold_and_compare, noise, operators, refusal


def conv_norm(net: Net, **parameters: object) -> ModelProto:
    """Conv -> batch norm with some of its four parameters replaced by an array."""
    names = dict(zip(("scale", "bias", "mean", "var"), net.norm_parameters(4), strict=True))
    for role, array in parameters.items():
        names[role] = net.constant(array)
    output = net.op("BatchNormalization", net.op("Conv", "x", net.weight(4, 3, 1)), *names.values())
    return net.model({"x": (2, 3, 5)}, output)


def test_refuses_training_mode() -> None:
    net = Net()
    norm = net.norm(net.op("Conv", "x", net.weight(4, 3, 1)), 4, training_mode=1)
    net.nodes[-1].output.extend(["running_mean", "running_var"])
    assert "training_mode is 1" in refusal(net.model({"x": (2, 3, 5)}, norm))


@pytest.mark.parametrize("opset", [9, 13])
def test_refuses_listed_statistics_below_opset_14(opset: int) -> None:
    """Nobody uses them, and yet onnxruntime then normalizes with the statistics of the batch."""
    net = Net(opset=opset)
    norm = net.norm(net.op("Conv", "x", net.weight(4, 3, 1)), 4)
    plain = net.model({"x": (2, 3, 5)}, norm)
    net.nodes[-1].output.extend(["mean", "var", "saved_mean", "saved_var"])
    listed = net.model({"x": (2, 3, 5)}, norm)
    assert "lists 5 outputs, which below opset 14 means training mode" in refusal(listed)
    x = noise(2, 3, 5)
    assert not np.allclose(evaluate(listed, x=x)[0], evaluate(plain, x=x)[0], atol=0.1)


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 21, 23])
def test_folds_every_form_since_opset_7(opset: int) -> None:
    net = Net(opset=opset)
    model = net.model({"x": (2, 3, 5)}, net.norm(net.op("Conv", "x", net.weight(4, 3, 1)), 4, momentum=0.5))
    folded, _ = fold_and_compare(model, x=noise(2, 3, 5))
    assert operators(folded) == ["Conv"]


def test_refuses_per_position_statistics() -> None:
    net = Net(opset=8)
    norm = net.norm(net.op("Conv", "x", net.weight(4, 3, 1)), 4, spatial=0)
    assert "spatial is 0" in refusal(net.model({"x": (2, 3, 5)}, norm))


def test_refuses_opset_6() -> None:
    net = Net(opset=6)
    norm = net.norm(net.op("Conv", "x", net.weight(4, 3, 1)), 4, is_test=1)
    assert "opset 6" in refusal(net.model({"x": (2, 3, 5)}, norm))


@pytest.mark.parametrize("role", ["scale", "bias", "mean", "variance"])
def test_refuses_computed_parameter(role: str) -> None:
    net = Net()
    convolved = net.op("Conv", "x", net.weight(4, 3, 1))
    parameters = dict(zip(("scale", "bias", "mean", "variance"), net.norm_parameters(4), strict=True))
    parameters[role] = net.op("Add", parameters[role], net.op("ReduceMax", "x", keepdims=0))
    model = net.model({"x": (2, 3, 5)}, net.op("BatchNormalization", convolved, *parameters.values()))
    assert f"its {role} is not constant: 'x' is given by the caller" in refusal(model)


@pytest.mark.parametrize(
    ("role", "vector", "reason"),
    [
        pytest.param("var", [1, 1, -1e-3, 1], "variances of at least 0, received -0.001", id="negative-variance"),
        pytest.param("var", [1, np.nan, 1, 1], "var: expected finite values, received nan in channel 1", id="nan"),
        pytest.param("mean", [1, 1, 1, np.inf], "mean: expected finite values, received inf", id="infinite-mean"),
    ],
)
def test_refuses_unusable_statistics(role: str, vector: list[float], reason: str) -> None:
    assert reason in refusal(conv_norm(Net(), **{role: np.array(vector, np.float32)}))


def test_refuses_zero_variance_without_eps() -> None:
    net = Net()
    parameters = [*net.norm_parameters(4)[:3], net.constant(np.array([1, 0, 1, 1], np.float32))]
    convolved = net.op("Conv", "x", net.weight(4, 3, 1))
    model = net.model({"x": (2, 3, 5)}, net.op("BatchNormalization", convolved, *parameters, epsilon=0.0))
    assert "var + eps: expected positive values, received 0.0 in channel 1" in refusal(model)


def test_folds_denormal_variance() -> None:
    """Real MobileNetV2 weights have running variances of 5.6e-45."""
    fold_and_compare(conv_norm(Net(), var=np.array([5.6e-45, 1, 1e-12, 0], np.float32)), x=noise(2, 3, 5))


def test_refuses_parameters_of_another_length() -> None:
    assert "not vectors of one length" in refusal(conv_norm(Net(), var=np.ones(1, np.float32)))


def half_network(weight_scale: float, norm_scale: float) -> ModelProto:
    net = Net(dtype=np.float16)
    weight = net.constant(np.full((4, 3, 1), weight_scale, np.float16))
    scale = net.constant(np.full(4, norm_scale, np.float16))
    zeros, ones = net.constant(np.zeros(4, np.float16)), net.constant(np.ones(4, np.float16))
    output = net.op("BatchNormalization", net.op("Conv", "x", weight), scale, zeros, zeros, ones)
    return net.model({"x": (2, 3, 5)}, output)


def test_refuses_float16_overflow() -> None:
    assert "the folded weight reaches 179999, more than float16 can hold" in refusal(half_network(300, 600))


def test_refuses_weights_that_vanish_in_float16() -> None:
    assert "float16 would lose 100% of it" in refusal(half_network(1e-4, 1e-5))


def test_refuses_weights_that_lose_digits_in_float16() -> None:
    assert "float16 would lose" in refusal(half_network(1.1e-3, 1e-3))


def test_folds_float16_with_one_rounding() -> None:
    folded, (entry,) = fold_onnx(half_network(1.1, 0.7))
    assert entry.status == "folded"
    assert entry.residual is not None
    assert entry.residual <= 2.0**-11
    assert {tensor.data_type for tensor in folded.graph.initializer} == {
        helper.np_dtype_to_tensor_dtype(np.dtype("f2"))
    }


def test_folds_bfloat16() -> None:
    net = Net(dtype=ml_dtypes.bfloat16)
    model = net.model({"x": (2, 3, 5)}, net.norm(net.op("Conv", "x", net.weight(4, 3, 1), net.weight(4)), 4))
    folded, (entry,) = fold_onnx(model)
    assert operators(folded) == ["Conv"]
    assert entry.residual is not None
    assert 2.0**-12 < entry.residual <= 2.0**-8


def test_keeps_float32_statistics_of_a_float16_network_exact() -> None:
    """Opset 15 allows other datatypes for the parameters; a variance above 65504 is one reason to use them."""
    net = Net(dtype=np.float16)
    convolved = net.op("Conv", "x", net.constant(np.full((4, 3, 1), 30.0, np.float16)))
    vectors = (np.full(4, 300.0), np.zeros(4), np.zeros(4), np.full(4, 90000.0))
    parameters = [net.constant(vector.astype(np.float32)) for vector in vectors]
    folded, _ = fold_onnx(net.model({"x": (2, 3, 5)}, net.op("BatchNormalization", convolved, *parameters)))
    assert operators(folded) == ["Conv"]
    weight = np.frombuffer(folded.graph.initializer[0].raw_data, np.float16)
    np.testing.assert_array_equal(weight, np.full(12, 30.0, np.float16))


def test_refuses_running_statistics_as_outputs() -> None:
    net = Net()
    norm = net.norm(net.op("Conv", "x", net.weight(4, 3, 1)), 4)
    net.nodes[-1].output.extend(["running_mean", "running_var"])
    assert "also gives running statistics" in refusal(net.model({"x": (2, 3, 5)}, norm))
