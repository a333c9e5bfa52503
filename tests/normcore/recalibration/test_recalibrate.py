"""Recalibrated statistics against a float64 evaluation written here, torch's update_bn, and a real checkpoint."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from normcore.checkpoints.onnx import GraphLimits, load_onnx
from normcore.errors import DeadlineError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.recalibration.batches import Batch
from normcore.recalibration.recalibrate import recalibrate_checkpoint, recalibrate_onnx
from tests.normcore.folding.builder import Array, Net, evaluate, noise
from tests.normcore.recalibration.networks import chain_and_branches, gemm, images, statistics, with_statistics


def sequential_reference(model: ModelProto, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The statistics of `chain_and_branches` in float64, each norm applied with those just computed."""
    tensors = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()).double()
        for tensor in model.graph.initializer
    }
    weights = [tensors[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    affine = [
        (tensors[node.input[1]], tensors[node.input[2]])
        for node in model.graph.node
        if node.op_type == "BatchNormalization"
    ]
    found: list[tuple[Tensor, Tensor]] = []

    def norm(tensor: Tensor) -> Tensor:
        weight, bias = affine[len(found)]
        mean, var = tensor.mean((0, 2, 3)), tensor.var((0, 2, 3), correction=1)
        found.append((mean, var))
        per_channel = (vector[None, :, None, None] for vector in (mean, var, weight, bias))
        center, spread, scale, shift = per_channel
        return (tensor - center) / torch.sqrt(spread + 1e-5) * scale + shift

    stem = norm(functional.conv2d(x, weights[0], padding=1)).relu()
    left, right = norm(stem), norm(functional.conv2d(stem, weights[1]))
    norm(left + right)
    return found


def test_statistics_are_those_of_a_sequential_float64_evaluation() -> None:
    model = chain_and_branches()
    batches = [images(count, seed=count, offset=count / 4) for count in (5, 2, 9)]
    recalibrated, report = recalibrate_onnx(model, batches)
    data = torch.cat([torch.from_numpy(batch["x"]).double() for batch in batches])
    for (mean, var), (wanted_mean, wanted_var) in zip(
        statistics(recalibrated), sequential_reference(model, data), strict=True
    ):
        deviation = np.sqrt(wanted_var.numpy())
        np.testing.assert_allclose(mean, wanted_mean.numpy(), rtol=0, atol=2e-6 * deviation.max())
        np.testing.assert_allclose(var, wanted_var.numpy(), rtol=5e-6)
    assert [layer.count for layer in report.layers] == [16 * 30] * 4


def test_layers_of_one_depth_share_a_pass() -> None:
    heard: list[tuple[str, int, int]] = []
    _, report = recalibrate_onnx(
        chain_and_branches(), [images(2), images(3)], progress=lambda *progress: heard.append(progress)
    )
    assert [layer.depth for layer in report.layers] == [0, 1, 1, 2]
    assert (report.passes, report.batches) == (3, 2)
    assert heard == [(f"pass {1 + run // 2} of 3", run + 1, 6) for run in range(6)]


def test_the_frozen_statistics_do_not_matter_and_the_model_is_not_changed() -> None:
    model = chain_and_branches()
    before = model.SerializeToString()
    recalibrated, _ = recalibrate_onnx(model, [images(4)])
    assert model.SerializeToString() == before
    for mean, var in ((7.0, 50.0), (0.0, -1.0), (float("nan"), float("inf"))):
        corrupted = with_statistics(model, mean=mean, var=var)
        assert recalibrate_onnx(corrupted, [images(4)])[0] == recalibrated


def test_how_the_data_are_split_does_not_matter() -> None:
    whole = images(9, offset=3.0)["x"]
    together, _ = recalibrate_onnx(chain_and_branches(), [{"x": whole}])
    apart, _ = recalibrate_onnx(chain_and_branches(), [{"x": whole[:1]}, {"x": whole[1:7]}, {"x": whole[7:]}])
    for left, right in zip(statistics(together), statistics(apart), strict=True):
        for one, other in zip(left, right, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


def test_the_report_says_how_far_statistics_moved() -> None:
    model = gemm()
    data = noise(40, 3)
    recalibrated, report = recalibrate_onnx(model, [{"x": data}])
    ((mean, var),), ((frozen_mean, frozen_var),) = statistics(recalibrated), statistics(model)
    (layer,) = report.layers
    shift = (mean - frozen_mean) / np.sqrt(frozen_var + 1e-5)
    ratio = (var + 1e-5) / (frozen_var + 1e-5)
    distance = np.hypot(shift, np.sqrt(ratio) - 1)
    assert layer.mean_shift == pytest.approx(shift[np.abs(shift).argmax()], rel=1e-5)
    assert layer.log_var_ratio == pytest.approx(np.log(ratio)[np.abs(np.log(ratio)).argmax()], rel=1e-5)
    assert layer.distance == pytest.approx(np.sqrt((distance**2).mean()), rel=1e-5)
    worst = layer.worst_channels[0]
    assert worst.channel == distance.argmax()
    assert worst.distance == pytest.approx(distance.max(), rel=1e-5)
    assert worst.mean == pytest.approx(mean[worst.channel])
    assert worst.var == pytest.approx(var[worst.channel])
    assert report.to_dict()["recalibrated"] == 1
    again = recalibrate_onnx(recalibrated, [{"x": data}])[1].layers[0]
    assert again.distance == pytest.approx(0.0, abs=1e-6)


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.norm, self.last = nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(2, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.second(torch.relu(self.norm(self.first(x)))))
        return result

    def as_onnx(self) -> ModelProto:
        net = Net()
        names = []
        for norm in (self.norm, self.last):
            vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            assert norm.running_mean is not None
            names.append([net.constant(vector.detach().numpy().copy()) for vector in vectors if vector is not None])
        weights = [net.constant(layer.weight.detach().numpy().T.copy()) for layer in (self.first, self.second)]
        hidden = net.op("BatchNormalization", net.op("MatMul", "x", weights[0]), *names[0])
        net.op("BatchNormalization", net.op("MatMul", net.op("Relu", hidden), weights[1]), *names[1], output="y")
        return net.model({"x": ["N", 3]}, "y")


@pytest.mark.parametrize("rows", [64, 1024])
def test_update_bn_agrees_on_one_batch_up_to_its_biased_normalization(rows: int) -> None:
    """update_bn measures all layers in training mode, where norms use the biased variance of their own batch."""
    torch.manual_seed(0)
    network = TwoNorms()
    data = torch.randn(rows, 3) + 2
    recalibrated, _ = recalibrate_onnx(network.as_onnx(), [{"x": data.numpy()}])
    update_bn([data], network)
    (mean, var), (last_mean, last_var) = statistics(recalibrated)
    for norm, ours, tolerance in ((network.norm, (mean, var), 2e-6), (network.last, (last_mean, last_var), 2 / rows)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        np.testing.assert_allclose(ours[0], norm.running_mean.numpy(), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(ours[1], norm.running_var.numpy(), rtol=tolerance)


def test_update_bn_misses_what_lies_between_batches() -> None:
    """Averaged batch variances have no share of how far the batches' means lie apart; pooled moments do."""
    torch.manual_seed(0)
    network = TwoNorms()
    batches = [torch.randn(50, 3) + offset for offset in (-4, 4)]
    recalibrated, _ = recalibrate_onnx(network.as_onnx(), [{"x": batch.numpy()} for batch in batches])
    update_bn(batches, network)
    hidden = torch.cat(batches).double() @ network.first.weight.detach().double().T
    mean, var = statistics(recalibrated)[0]
    assert network.norm.running_var is not None
    np.testing.assert_allclose(var, hidden.var(0, correction=1).numpy(), rtol=2e-6)
    np.testing.assert_allclose(mean, hidden.mean(0).numpy(), rtol=1e-5)
    assert (var > 2 * network.norm.running_var.numpy()).any()


def test_a_real_checkpoint_recalibrates_to_the_same_bytes_whatever_it_held(ocr_cls: Path) -> None:
    model = load_onnx(ocr_cls)
    batches: list[Batch] = [{"x": noise(4, 3, 48, 64, seed=seed)} for seed in (1, 2)]
    recalibrated, report = recalibrate_onnx(model, batches)
    corrupted, other = recalibrate_onnx(with_statistics(model, mean=3.0, var=0.25), batches)
    assert corrupted == recalibrated
    assert (len(report.layers), report.kept, report.passes) == (35, (), 35)
    assert [layer.count for layer in report.layers] == [layer.count for layer in other.layers]
    before, after = (evaluate(each, **batches[0])[0] for each in (model, recalibrated))
    assert np.isfinite(after).all()
    assert not np.allclose(before, after)


def test_a_file_is_written_whole_and_the_source_stays(tmp_path: Path, ocr_cls: Path) -> None:
    source, target = ocr_cls, tmp_path / "new.onnx"
    before = source.read_bytes()
    heard: list[tuple[str, int, int]] = []
    report = recalibrate_checkpoint(
        source,
        target,
        [{"x": noise(2, 3, 48, 48)}],
        limits=GraphLimits(),
        progress=lambda *progress: heard.append(progress),
    )
    assert source.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
    assert len(report.layers) == 35
    assert [step for step, _, _ in heard[:2]] == ["load", "pass 1 of 35"]
    assert heard[-2:] == [("write", 36, 37), ("done", 37, 37)]
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    onnx.checker.check_model(str(target))
    assert len(load_onnx(target).graph.node) == 566 - 70, "the Constant nodes of the old statistics are gone"


def test_without_batch_norms_the_file_stays_and_the_report_says_so(tmp_path: Path) -> None:
    net = Net()
    net.op("Relu", "x", output="y")
    model = net.model({"x": ["N", 3]}, "y")
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    source.write_bytes(model.SerializeToString())
    report = recalibrate_checkpoint(source, target, [{"x": noise(2, 3)}], limits=GraphLimits())
    assert target.read_bytes() == source.read_bytes()
    assert (report.layers, report.kept, report.passes) == ((), (), 0)
    assert "no batch norm" in report.notes[0]


X = noise(5, 3)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        pytest.param([], ParameterError, ("batches", "none"), id="no-batch"),
        pytest.param([{"x": X, "z": X}], ParameterError, ("z", "x"), id="unknown-input"),
        pytest.param([{"x": X}, {}], ParameterError, ("x of batch 1",), id="missing-input"),
        pytest.param([{"x": X.astype(np.float64)}], DtypeError, ("x", "float32", "float64"), id="datatype"),
        pytest.param([{"x": X}, {"x": X[:, :2]}], ShapeError, ("x of batch 1", "[-1, 3]", "[5, 2]"), id="shape"),
        pytest.param([{"x": X[0]}], ShapeError, ("[-1, 3]", "[3]"), id="rank"),
        pytest.param([{"x": X[:0]}], ShapeError, ("x", "at least one element", "[0, 3]"), id="empty"),
        pytest.param([{"x": X[:1]}], StatisticsError, ("batchnormalization_1", "2 values"), id="one-value"),
        pytest.param(
            [{"x": X}, {"x": X * np.float32(np.nan)}],
            StatisticsError,
            ("batchnormalization_1", "channel 0", "'hidden'", "batch 1"),
            id="nan",
        ),
        pytest.param(
            [{"x": X / np.abs(X).max() * np.float32(3e38)}],
            StatisticsError,
            ("batchnormalization_1", "fit float32"),
            id="overflow",
        ),
    ],
)
def test_refuses(batches: list[Batch], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as refused:
        recalibrate_onnx(gemm(), batches)
    for word in words:
        assert word in str(refused.value)


def test_refuses_a_variance_that_its_datatype_cannot_hold() -> None:
    net = Net(dtype=np.float16)
    net.norm("x", 3, output="y")
    model = net.model({"x": ["N", 3]}, "y")
    batch = {"x": (noise(9, 3) * 3000).astype(np.float16)}
    with pytest.raises(StatisticsError, match=r"batchnormalization_0: expected statistics that fit float16"):
        recalibrate_onnx(model, [batch])


def test_refuses_a_constant_channel_where_epsilon_is_zero() -> None:
    with pytest.raises(StatisticsError, match=r"vary in every channel.*variance of 0 in channel 0"):
        recalibrate_onnx(gemm(epsilon=0.0), [{"x": np.ones((4, 3), np.float32)}])


def test_a_constant_channel_gets_a_variance_of_zero() -> None:
    recalibrated, _ = recalibrate_onnx(gemm(), [{"x": np.ones((4, 3), np.float32)}])
    ((_, var),) = statistics(recalibrated)
    assert (var == 0).all()
    assert np.isfinite(evaluate(recalibrated, x=noise(4, 3))[0]).all()


def test_stops_at_its_deadline() -> None:
    with pytest.raises(DeadlineError, match="calibration"):
        recalibrate_onnx(chain_and_branches(), [images(2)], deadline_s=0.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float16], ids=["float64", "float16"])
def test_statistics_keep_their_datatype(dtype: type) -> None:
    net = Net(dtype=dtype)
    net.norm("x", 3, output="y")
    data: Array = noise(50, 3).astype(dtype)
    recalibrated, _ = recalibrate_onnx(net.model({"x": ["N", 3]}, "y"), [{"x": data}])
    ((mean, var),) = statistics(recalibrated)
    assert mean.dtype == var.dtype == np.dtype(dtype)
    tolerance = 4 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(mean, data.astype(np.float64).mean(0), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(var, data.astype(np.float64).var(0, ddof=1), rtol=tolerance)


def test_two_inputs_are_fed_by_name() -> None:
    net = Net()
    net.norm(net.op("Sub", "x", "z", output="hidden"), 3, output="y")
    model = net.model({"x": ["N", 3], "z": ["N", 3]}, "y")
    recalibrated, _ = recalibrate_onnx(model, [{"z": noise(8, 3, seed=1), "x": noise(8, 3, seed=2)}])
    ((mean, _),) = statistics(recalibrated)
    np.testing.assert_allclose(mean, (noise(8, 3, seed=2) - noise(8, 3, seed=1)).mean(0), atol=1e-6)


def test_an_initializer_that_callers_may_override_and_only_a_later_layer_needs_is_not_asked_for() -> None:
    net = Net()
    late = net.weight(3, 2)
    net.norm(net.op("MatMul", net.norm(net.op("Relu", "x"), 3), late), 2, output="y")
    model = net.model({"x": ["N", 3]}, "y", overridable=[late])
    recalibrated, report = recalibrate_onnx(model, [{"x": noise(9, 3)}])
    assert len(report.layers) == 2
    assert [info.name for info in recalibrated.graph.input] == ["x", late]


def test_a_norm_behind_a_subgraph_waits_for_the_norm_that_the_subgraph_reads() -> None:
    """An If whose branches read the first norm's output by name, not as an input."""
    net = Net()
    first = net.norm("x", 3, output="first")
    branches = [
        helper.make_graph(
            [helper.make_node(operator, [first], [f"{operator}_out"])],
            operator,
            [],
            [helper.make_tensor_value_info(f"{operator}_out", 1, ["N", 3])],
        )
        for operator in ("Relu", "Neg")
    ]
    condition = net.constant(np.array(True))
    joined = net.op("If", condition, output="joined", then_branch=branches[0], else_branch=branches[1])
    net.norm(joined, 3, output="y")
    model = net.model({"x": ["N", 3]}, "y")
    data = noise(30, 3)
    recalibrated, report = recalibrate_onnx(model, [{"x": data}])
    assert [layer.depth for layer in report.layers] == [0, 1]
    (mean, _), (last_mean, _) = statistics(recalibrated)
    np.testing.assert_allclose(mean, data.mean(0), atol=1e-6)
    show = ModelProto()
    show.CopyFrom(recalibrated)
    show.graph.output.append(helper.make_tensor_value_info("joined", 1, None))
    np.testing.assert_allclose(last_mean, evaluate(show, x=data)[1].mean(0), atol=1e-6)
