"""Which batch norms are recalibrated, and the reasons of those that are not."""

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from normcore.recalibration.recalibrate import recalibrate_onnx
from normcore.recalibration.report import RecalibrationReport
from tests.normcore.folding.builder import Net, evaluate, noise
from tests.normcore.recalibration.networks import gemm, statistics

BATCH = {"x": noise(6, 3)}


def kept_reason(model: ModelProto) -> str:
    """Why the only batch norm is kept; the model is then unchanged."""
    recalibrated, report = recalibrate_onnx(model, [BATCH])
    assert recalibrated == model
    assert report.layers == ()
    (kept,) = report.kept
    return kept.reason


def test_training_mode_is_kept() -> None:
    model = gemm(training_mode=1)
    model.graph.node[1].output.extend(["m", "v"])
    assert "training_mode is 1" in kept_reason(model)


def test_statistics_that_the_caller_gives_are_kept() -> None:
    net = Net()
    scale, bias, _, var = net.norm_parameters(3)
    mean = net.op("ReduceMean", "x", axes=[0], keepdims=0)
    net.op("BatchNormalization", "x", scale, bias, mean, var, output="y")
    assert "its mean is not constant" in kept_reason(net.model({"x": ["N", 3]}, "y"))


def test_overridable_statistics_are_kept_until_frozen() -> None:
    net = Net()
    names = net.norm_parameters(3)
    net.op("BatchNormalization", "x", *names, output="y")
    model = net.model({"x": ["N", 3]}, "y", overridable=names)
    assert "freeze_initializers" in kept_reason(model)
    frozen, report = recalibrate_onnx(model, [BATCH], freeze_initializers=True)
    assert len(report.layers) == 1
    assert [info.name for info in frozen.graph.input] == ["x"]
    np.testing.assert_allclose(statistics(frozen)[0][0], BATCH["x"].mean(0), atol=1e-6)


def test_a_norm_in_a_subgraph_is_kept_and_named() -> None:
    net = Net()
    names = net.norm_parameters(3)
    inner = helper.make_node("BatchNormalization", ["x", *names], ["inner_out"], name="inner")
    branches = [
        helper.make_graph([node], node.op_type, [], [helper.make_tensor_value_info(node.output[0], 1, ["N", 3])])
        for node in (inner, helper.make_node("Neg", ["x"], ["other_out"]))
    ]
    condition = net.constant(np.array(True))
    net.op("If", condition, output="y", then_branch=branches[0], else_branch=branches[1])
    reason = kept_reason(net.model({"x": ["N", 3]}, "y"))
    assert reason.startswith("it is inside a subgraph of If")


@pytest.mark.parametrize("role", [3, 4], ids=["mean", "variance"])
def test_norms_that_share_a_statistic_are_both_kept(role: int) -> None:
    net = Net()
    first, second = net.norm_parameters(3), list(net.norm_parameters(3))
    second[role - 1] = first[role - 1]
    hidden = net.op("BatchNormalization", "x", *first)
    third = net.norm(net.op("BatchNormalization", hidden, *second), 3, output="y")
    model = net.model({"x": ["N", 3]}, third)
    recalibrated, report = recalibrate_onnx(model, [BATCH])
    assert len(report.layers) == 1
    assert [kept.normalization for kept in report.kept] == ["batchnormalization_0", "batchnormalization_1"]
    for kept in report.kept:
        assert ("mean" if role == 3 else "variance") in kept.reason
        assert "belongs to another batch norm too" in kept.reason
    for before, after in list(zip(statistics(model), statistics(recalibrated), strict=True))[:2]:
        np.testing.assert_array_equal(before, after)


def recalibrated_with(*names: str, net: Net) -> tuple[ModelProto, RecalibrationReport]:
    net.op("BatchNormalization", "x", *names, output="y")
    model = net.model({"x": ["N", 3]}, "y")
    recalibrated, report = recalibrate_onnx(model, [BATCH])
    assert len(report.layers) == 1
    ((mean, var),) = statistics(recalibrated)
    np.testing.assert_allclose(mean, BATCH["x"].mean(0), atol=1e-6)
    np.testing.assert_allclose(var, BATCH["x"].var(0, ddof=1), rtol=1e-5)
    return recalibrated, report


def test_a_tensor_that_is_mean_and_bias_at_once_is_only_replaced_as_the_mean() -> None:
    net = Net()
    scale, bias, _, var = net.norm_parameters(3)
    recalibrated, _ = recalibrated_with(scale, bias, bias, var, net=net)
    node = recalibrated.graph.node[0]
    assert node.input[2] == bias
    assert node.input[3] != bias
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in recalibrated.graph.initializer}
    np.testing.assert_array_equal(tensors[bias], numpy_helper.to_array(net.initializers[bias]))


def test_a_tensor_that_is_mean_and_variance_at_once_becomes_two() -> None:
    net = Net()
    scale, bias, _, var = net.norm_parameters(3)
    recalibrated, _ = recalibrated_with(scale, bias, var, var, net=net)
    assert len(set(recalibrated.graph.node[0].input[3:])) == 2


def test_statistics_behind_identities_are_found_and_untangled() -> None:
    """Exporters write one tensor for equal statistics of several norms, and an Identity for each."""
    net = Net()
    scale, bias, mean, var = net.norm_parameters(3)
    recalibrated, _ = recalibrated_with(scale, bias, net.op("Identity", mean), net.op("Identity", var), net=net)
    assert [node.op_type for node in recalibrated.graph.node] == ["BatchNormalization"]


def test_an_output_that_is_a_statistic_keeps_its_old_value() -> None:
    net = Net()
    names = net.norm_parameters(3)
    net.op("BatchNormalization", "x", *names, output="y")
    model = net.model({"x": ["N", 3]}, "y", names[2])
    recalibrated, _ = recalibrate_onnx(model, [BATCH])
    np.testing.assert_array_equal(evaluate(recalibrated, **BATCH)[1], evaluate(model, **BATCH)[1])


def test_a_norm_of_a_constant_is_kept() -> None:
    net = Net()
    constant = net.norm(net.constant(noise(2, 3)), 3)
    net.op("Add", "x", net.op("ReduceMean", constant, axes=[0], keepdims=1), output="y")
    assert "same in every run" in kept_reason(net.model({"x": ["N", 3]}, "y"))
