"""Conversions between conventions, against layers that keep their statistics in each."""

import numpy as np
import onnx
import onnx.helper
import onnx.reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normcore.errors import NormcoreError, ParameterError, ShapeError, StatisticsError
from normcore.statistics import (
    CONVENTIONS,
    Moments,
    PopulationStatistics,
    RunningStatistics,
    convert_momentum,
    convert_running,
    initial_share,
    running_of_caffe,
)

BATCHES = list(torch.randn(6, 8, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 2)


def _of_torch(momentum: float | None) -> RunningStatistics:
    layer = torch.nn.BatchNorm1d(3, momentum=momentum).double()
    for batch in BATCHES:
        layer(batch)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return RunningStatistics(layer.running_mean, layer.running_var)


def _of_onnx(momentum: float) -> RunningStatistics:
    names = [["x", "scale", "bias", "mean", "var"], ["y", "new_mean", "new_var"]]
    node = onnx.helper.make_node("BatchNormalization", names[0], names[1], momentum=momentum, training_mode=1)
    kind = onnx.TensorProto.DOUBLE
    inputs, outputs = ([onnx.helper.make_tensor_value_info(name, kind, None) for name in row] for row in names)
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)])
    session = onnx.reference.ReferenceEvaluator(model)
    mean, var = torch.zeros(3).double().numpy(), torch.ones(3).double().numpy()
    affine = {"scale": torch.ones(3).double().numpy(), "bias": mean}
    for batch in BATCHES:
        _, *new = session.run(None, {"x": batch.numpy(), **affine, "mean": mean, "var": var})
        mean, var = (np.asarray(statistic) for statistic in new)
    return RunningStatistics(torch.from_numpy(mean), torch.from_numpy(var))


def _of_keras(momentum: float) -> RunningStatistics:
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for batch in BATCHES:
        mean = mean * momentum + batch.mean((0, 2)) * (1 - momentum)
        var = var * momentum + batch.var((0, 2), correction=0) * (1 - momentum)
    return RunningStatistics(mean, var)


@pytest.mark.filterwarnings("ignore")  # another library's, where it is installed
def test_the_layer_of_keras_keeps_what_we_say_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization(axis=1, momentum=0.7, dtype="float64")
    for batch in BATCHES:
        layer(batch.numpy(), training=True)
    mean, var = (
        torch.as_tensor(np.array(keras.ops.convert_to_numpy(value)))
        for value in (layer.moving_mean, layer.moving_variance)
    )
    _assert_close(_of_keras(0.7), RunningStatistics(mean, var), rtol=1e-6)  # keras multiplies by a float32


def _assert_close(actual: RunningStatistics, expected: RunningStatistics, *, rtol: float = 1e-13) -> None:
    assert torch.allclose(actual.mean, expected.mean, rtol=rtol)
    assert torch.allclose(actual.var, expected.var, rtol=rtol)


@pytest.mark.parametrize("target", ["onnx", "keras"])
def test_statistics_of_torch_convert_to_those_of_another_layer_and_back(target: str) -> None:
    momentum = convert_momentum(0.3, source="torch", target=target)
    share = initial_share(0.3, convention="torch", batches=len(BATCHES))
    assert initial_share(1.0, convention="torch", batches=0) == 1.0
    assert share == pytest.approx(0.7**6)
    expected = _of_onnx(momentum) if target == "onnx" else _of_keras(momentum)
    # The attribute of an ONNX node is a float32.
    rtol = 1e-6 if target == "onnx" else 1e-13
    converted = convert_running(_of_torch(0.3), source="torch", target=target, batch_count=40, initial_share=share)
    _assert_close(converted, expected, rtol=rtol)
    back = convert_running(converted, source=target, target="torch", batch_count=40, initial_share=share)
    _assert_close(back, _of_torch(0.3))


def test_cumulative_statistics_have_no_initial_share() -> None:
    converted = convert_running(_of_torch(None), source="torch", target="keras", batch_count=40)
    plain = torch.stack([batch.var((0, 2), correction=0) for batch in BATCHES]).mean(0)
    assert torch.allclose(converted.var, plain, rtol=1e-13)


def test_between_conventions_of_one_correction_nothing_changes() -> None:
    running = _of_torch(0.1)
    assert convert_running(running, source="keras", target="onnx", batch_count=2) is running
    assert convert_momentum(0.99, source="keras", target="onnx") == 0.99


@given(st.integers(0, 10**6))
def test_momentum_goes_there_and_back(millionths: int) -> None:
    momentum = millionths / 10**6
    there = convert_momentum(momentum, source="torch", target="keras")
    assert there == pytest.approx(1 - momentum)
    assert convert_momentum(there, source="keras", target="torch") == momentum


@given(st.floats(0.01, 0.99), st.integers(1, 60), st.sampled_from(sorted(CONVENTIONS)))
@settings(deadline=None)
def test_initial_share_is_what_is_left_of_the_start(momentum: float, batches: int, convention: str) -> None:
    state = PopulationStatistics.start(1, momentum=momentum, convention=convention)
    nothing = torch.zeros(1, dtype=torch.float64)
    for _ in range(batches):
        state = state.update(Moments(nothing + 2, nothing, nothing))
    assert state.ema is not None
    share = initial_share(momentum, convention=convention, batches=batches)
    assert share == pytest.approx(float(state.ema.var), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("fraction", [0.999, 0.5])
def test_caffe_blobs_are_the_debiased_average(fraction: float) -> None:
    mean, var, scale = torch.zeros(3).double(), torch.zeros(3).double(), torch.zeros(1).double()
    state = PopulationStatistics.start(3, momentum=1 - fraction)
    for batch in BATCHES:
        scale = scale * fraction + 1
        mean = mean * fraction + batch.mean((0, 2))
        var = var * fraction + batch.var((0, 2))
        state = state.update(Moments.of(batch))
    running, debiased = running_of_caffe(mean, var, scale), state.ema_debiased
    assert debiased is not None
    _assert_close(running, RunningStatistics(debiased.mean, debiased.var), rtol=1e-12)


def test_caffe_blobs_before_any_batch_are_zero() -> None:
    running = running_of_caffe(torch.ones(2), torch.ones(2), torch.zeros(1))
    assert (running.mean.tolist(), running.var.tolist()) == ([0.0, 0.0], [0.0, 0.0])


def test_impossible_conversions_are_refused() -> None:
    running = RunningStatistics(torch.zeros(1), torch.ones(1) / 2)
    with pytest.raises(ParameterError, match="convention: expected one of"):
        convert_momentum(0.5, source="caffe", target="torch")
    with pytest.raises(ParameterError, match="momentum: expected a number from 0 to 1, received 2"):
        convert_momentum(2, source="onnx", target="torch")
    with pytest.raises(ParameterError, match="batches: expected an integer >= 0"):
        initial_share(0.5, convention="torch", batches=-1)
    with pytest.raises(ParameterError, match="batch_count: expected an integer >= 2, received 1"):
        convert_running(running, source="torch", target="onnx", batch_count=1)
    with pytest.raises(ParameterError, match="initial_share"):
        convert_running(running, source="torch", target="onnx", batch_count=2, initial_share=1.5)
    with pytest.raises(StatisticsError, match=r"running_var: expected at least .* 0.9, received 0.5"):
        convert_running(running, source="torch", target="onnx", batch_count=2, initial_share=0.9)


@pytest.mark.parametrize(
    ("var", "scale", "error", "message"),
    [
        (torch.ones(2), torch.ones(2), ShapeError, "scale: expected a single value"),
        (torch.ones(2), torch.tensor([-1.0]), StatisticsError, "scale: expected a finite value >= 0, received -1"),
        (-torch.ones(2), torch.ones(1), StatisticsError, "var: expected values >= 0"),
        (torch.ones(3), torch.ones(1), ShapeError, "var: expected shape"),
    ],
    ids=["scale shape", "scale negative", "var negative", "channels"],
)
def test_impossible_blobs_are_refused(
    var: torch.Tensor, scale: torch.Tensor, error: type[NormcoreError], message: str
) -> None:
    with pytest.raises(error, match=message):
        running_of_caffe(torch.ones(2), var, scale)
