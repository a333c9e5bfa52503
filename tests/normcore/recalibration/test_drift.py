"""The verdict on frozen statistics: fresh on their own data, stale on other data, unknown where nothing can tell."""

from pathlib import Path

import numpy as np
import pytest

from normcore.checkpoints.onnx import load_onnx
from normcore.errors import ParameterError, StatisticsError
from normcore.recalibration.drift import measure_drift
from normcore.recalibration.recalibrate import recalibrate_onnx
from tests.normcore.folding.builder import Net, noise
from tests.normcore.recalibration.networks import chain_and_branches, gemm, images, statistics, with_statistics


def test_recalibrated_statistics_are_fresh_on_their_data_and_on_more_of_the_kind() -> None:
    model, _ = recalibrate_onnx(chain_and_branches(), [images(40)])
    same = measure_drift(model, [images(40)])
    assert (same.verdict, len(same.layers), same.batches) == ("fresh", 4, 1)
    assert max(layer.distance or 0.0 for layer in same.layers) < 1e-6
    other = measure_drift(model, [images(20, seed=8), images(20, seed=9)])
    assert other.verdict == "fresh"
    assert all(0 < (layer.distance or 0.0) < 0.1 for layer in other.layers)
    assert other.sentence.startswith("All 4 batch norms are within 0.25 frozen standard deviations")


@pytest.mark.parametrize(("offset", "scale"), [(0.5, 1.0), (0.0, 2.0)], ids=["moved", "wider"])
def test_other_data_are_stale(offset: float, scale: float) -> None:
    model, _ = recalibrate_onnx(chain_and_branches(), [images(40)])
    report = measure_drift(model, [images(40, seed=8, offset=offset, scale=scale)])
    assert report.verdict == "stale"
    furthest = max(report.layers, key=lambda layer: layer.distance or 0.0)
    assert repr(furthest.normalization) in report.sentence
    assert f"{furthest.distance:.3g}" in report.sentence
    assert measure_drift(model, [images(40, seed=8, offset=offset, scale=scale)], threshold=1e3).verdict == "fresh"


def test_numbers_of_one_layer_are_exact() -> None:
    model = gemm()
    data = noise(200, 3)
    weight = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [3, 2])
    hidden = data.astype(np.float64) @ np.frombuffer(weight.raw_data, np.float32).reshape(3, 2)
    ((frozen_mean, frozen_var),) = statistics(model)
    (layer,) = measure_drift(model, [{"x": data[:70]}, {"x": data[70:]}]).layers
    for channel in layer.worst_channels:
        at = channel.channel
        deviation = np.sqrt(frozen_var[at] + 1e-5)
        var = hidden[:, at].var(ddof=1)
        assert channel.mean_shift == pytest.approx((hidden[:, at].mean() - frozen_mean[at]) / deviation, abs=1e-6)
        assert channel.log_var_ratio == pytest.approx(np.log((var + 1e-5) / (frozen_var[at] + 1e-5)), abs=1e-6)
        assert (channel.frozen_mean, channel.frozen_var) == (frozen_mean[at], frozen_var[at])
    assert layer.count == 200
    assert layer.noise == pytest.approx(np.sqrt(1.5 / 200))


def test_noise_is_what_unchanged_data_show_by_chance() -> None:
    """Of 400 draws of 50 values from the frozen distribution itself."""
    net = Net()
    ones, zeros = net.constant(np.ones(400, np.float32)), net.constant(np.zeros(400, np.float32))
    net.op("BatchNormalization", "x", ones, zeros, net.constant(np.zeros(400, np.float32), "m"), "v", output="y")
    net.constant(np.ones(400, np.float32), "v")
    (layer,) = measure_drift(net.model({"x": ["N", 400]}, "y"), [{"x": noise(50, 400)}]).layers
    assert layer.distance == pytest.approx(layer.noise, rel=0.1)


def test_too_few_values_are_unknown() -> None:
    report = measure_drift(gemm(), [{"x": noise(4, 3)}])
    assert report.verdict == "unknown"
    assert "4 per channel" in report.sentence


def test_one_layer_with_too_few_values_leaves_it_unknown_where_the_others_are_fresh() -> None:
    net = Net()
    pooled = net.op("GlobalAveragePool", net.norm("x", 3), output="pooled")
    net.norm(pooled, 3, output="y")
    data = [images(4)]
    model, _ = recalibrate_onnx(net.model({"x": ["N", 3, "H", "W"]}, "y"), data)
    report = measure_drift(model, data)
    assert report.verdict == "unknown"
    assert report.sentence.startswith("1 of 2 batch norms have too few values")


def test_the_threshold_is_the_distance_from_which_a_layer_is_stale() -> None:
    data = [{"x": noise(200, 3)}]
    (layer,) = measure_drift(gemm(), data).layers
    assert layer.distance is not None
    verdicts = [measure_drift(gemm(), data, threshold=layer.distance * share).verdict for share in (0.99, 1.01)]
    assert verdicts == ["stale", "fresh"]


def test_no_batch_norm_is_unknown() -> None:
    net = Net()
    net.op("Relu", "x", output="y")
    report = measure_drift(net.model({"x": ["N", 3]}, "y"), [{"x": noise(4, 3)}])
    assert (report.verdict, report.layers) == ("unknown", ())


def test_frozen_statistics_that_are_none_are_stale() -> None:
    report = measure_drift(with_statistics(gemm(), mean=0.0, var=-1.0), [{"x": noise(100, 3)}])
    (layer,) = report.layers
    assert (report.verdict, layer.distance, layer.mean_shift, layer.log_var_ratio) == ("stale", None, None, None)
    assert "are no mean and variance" in report.sentence


def test_activations_that_are_not_finite_name_the_layer() -> None:
    broken = with_statistics(chain_and_branches(), mean=0.0, var=-1.0)
    with pytest.raises(StatisticsError, match=r"batchnormalization_\d: expected finite activations"):
        measure_drift(broken, [images(4)])


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_refuses_a_threshold_that_is_none(threshold: float) -> None:
    with pytest.raises(ParameterError, match="threshold"):
        measure_drift(gemm(), [{"x": noise(9, 3)}], threshold=threshold)


def test_a_real_checkpoint_is_stale_on_noise(ocr_cls: Path) -> None:
    before = load_onnx(ocr_cls)
    report = measure_drift(before, [{"x": noise(4, 3, 48, 64)}])
    assert (report.verdict, len(report.layers), report.kept) == ("stale", 35, ())
    assert load_onnx(ocr_cls) == before


def test_a_real_checkpoint_shows_no_drift_on_the_data_it_was_recalibrated_on(ocr_cls: Path) -> None:
    batches = [{"x": noise(2, 3, 48, 64, seed=seed)} for seed in (1, 2)]
    recalibrated, _ = recalibrate_onnx(load_onnx(ocr_cls), batches)
    report = measure_drift(recalibrated, batches, threshold=1e-2)
    assert max(layer.distance or 0.0 for layer in report.layers) < 1e-6


def test_overridable_initializers_are_taken_as_they_are() -> None:
    net = Net()
    names = net.norm_parameters(3)
    net.op("BatchNormalization", "x", *names, output="y")
    model = net.model({"x": ["N", 3]}, "y", overridable=names)
    before = model.SerializeToString()
    assert len(measure_drift(model, [{"x": noise(9, 3)}]).layers) == 1
    assert model.SerializeToString() == before
