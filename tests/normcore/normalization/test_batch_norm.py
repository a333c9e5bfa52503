"""Behaviour of batch norm: shapes, state, conventions, edge cases, refusals and diagnostics."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import METHODS, batch_norm
from tests.normcore.normalization import oracle

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 2, 3)]


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 2 + 1


def _torch_module(rank: int, momentum: float | None) -> torch.nn.modules.batchnorm._BatchNorm:
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[rank]
    return kind(3, momentum=momentum)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, 1.0, None], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["NC", "NCL", "NCHW", "NCDHW"])
def test_several_steps_equal_torch(shape: tuple[int, ...], momentum: float | None) -> None:
    module = _torch_module(len(shape), momentum)
    weight, bias = torch.tensor([0.5, 1.0, -2.0]), torch.tensor([0.0, 1.0, 2.0])
    module.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    generator = torch.Generator().manual_seed(1)
    mean, var, tracked = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for _ in range(4):
        input = torch.randn(shape, generator=generator) * 3 - 1
        result = batch_norm(
            input, mean, var, weight, bias, num_batches_tracked=tracked, training=True, momentum=momentum
        )
        assert torch.allclose(result.output, module(input), atol=2e-6)
        assert result.running_mean is not None
        assert result.running_var is not None
        assert result.num_batches_tracked is not None
        mean, var, tracked = result.running_mean, result.running_var, result.num_batches_tracked
    state = module.state_dict()
    assert torch.allclose(mean, state["running_mean"], rtol=1e-6, atol=1e-6)
    assert torch.allclose(var, state["running_var"], rtol=1e-6)
    assert tracked.equal(state["num_batches_tracked"])
    module.eval()
    assert torch.allclose(batch_norm(input, mean, var, weight, bias).output, module(input), atol=2e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", SHAPES, ids=["NC", "NCL", "NCHW", "NCDHW"])
def test_channel_axis_moves_nothing_else(shape: tuple[int, ...], training: bool) -> None:
    input = _randn(*shape)
    statistics = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    expected = batch_norm(input, *statistics, training=training)
    for axis in range(-input.ndim, input.ndim):
        moved = input.movedim(1, axis).contiguous()
        result = batch_norm(moved, *statistics, training=training, channel_axis=axis)
        assert result.output.is_contiguous()
        assert torch.allclose(result.output.movedim(axis, 1), expected.output, atol=5e-7)
        assert result.mean is not None
        assert expected.mean is not None
        assert torch.allclose(result.mean, expected.mean, rtol=1e-6)


def test_input_with_gaps_gives_the_same_output() -> None:
    input = _randn(4, 3, 5, 8)
    result = batch_norm(input[..., ::2], training=True)
    assert torch.equal(result.output, batch_norm(input[..., ::2].contiguous(), training=True).output)


@pytest.mark.parametrize(
    ("dtype", "statistics_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_statistics_are_float64_for_float64_and_else_float32(
    dtype: torch.dtype, statistics_dtype: torch.dtype, training: bool
) -> None:
    result = batch_norm(_randn(6, 3, dtype=dtype), torch.zeros(3), torch.ones(3), training=training)
    assert result.output.dtype == dtype
    for name in ("mean", "var", "invstd") + (("running_mean", "running_var") if training else ()):
        assert getattr(result, name).dtype == statistics_dtype


def test_parameters_of_other_floating_datatypes_are_taken() -> None:
    input = _randn(8, 3, 5, dtype=torch.float16)
    weight, bias = torch.tensor([1 / 3, 1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3]).double()
    result = batch_norm(input, None, None, weight, bias, training=True)
    mean, var = oracle.batch_statistics(input)
    expected = oracle.normalized(input, mean, var, oracle.exact(weight), oracle.exact(bias), eps=1e-5)
    assert np.abs(oracle.exact(result.output) - expected).max() <= 2.0**-9


def test_training_reports_the_batch_and_inference_the_running_statistics() -> None:
    input = _randn(6, 3, 4)
    trained = batch_norm(input, training=True, eps=1e-3)
    assert trained.mean is not None
    assert trained.var is not None
    assert trained.invstd is not None
    assert torch.allclose(trained.mean, input.mean((0, 2)))
    assert torch.allclose(trained.var, input.var((0, 2), correction=0))
    assert torch.allclose(trained.invstd, (trained.var + 1e-3).rsqrt())
    assert (trained.running_mean, trained.running_var, trained.num_batches_tracked) == (None, None, None)
    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    inferred = batch_norm(input, mean, var, num_batches_tracked=torch.tensor(3))
    assert inferred.mean is not None
    assert inferred.var is not None
    assert torch.equal(inferred.mean, mean)
    assert torch.equal(inferred.var, var)
    assert (inferred.running_mean, inferred.running_var, inferred.num_batches_tracked) == (None, None, None)


@pytest.mark.parametrize(
    ("convention", "weight_of_new", "correction"), [("torch", 0.1, 1), ("onnx", 0.1, 0), ("keras", 0.01, 0)]
)
def test_conventions_differ_in_the_update_alone(convention: str, weight_of_new: float, correction: int) -> None:
    input = _randn(6, 3)
    result = batch_norm(input, torch.zeros(3), torch.ones(3), training=True, convention=convention)
    assert torch.equal(result.output, batch_norm(input, training=True).output)
    assert result.running_var is not None
    expected = (1 - weight_of_new) + weight_of_new * input.var(0, correction=correction)
    assert torch.allclose(result.running_var, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_no_argument_is_changed_or_shared(dtype: torch.dtype, training: bool) -> None:
    arguments = [_randn(4, 3, 5, dtype=dtype), *(torch.rand(3, dtype=dtype) + 1 for _ in range(4))]
    tracked = torch.tensor(5)
    before = [argument.clone() for argument in arguments]
    result = batch_norm(*arguments, num_batches_tracked=tracked, training=training)
    for name in (output.name for output in METHODS["batch_norm"].outputs):
        if isinstance(output := getattr(result, name), torch.Tensor):
            output.fill_(77)
    assert all(map(torch.equal, arguments, before))
    assert int(tracked) == 5


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_empty_batch_changes_nothing(shape: tuple[int, ...], momentum: float | None) -> None:
    mean, var = torch.ones(shape[1]), torch.ones(shape[1]) * 2
    tracked = torch.tensor(4)
    input = torch.empty(shape)
    result = batch_norm(input, mean, var, num_batches_tracked=tracked, training=True, momentum=momentum)
    assert result.output.shape == shape
    assert (result.mean, result.var, result.invstd) == (None, None, None)
    assert result.running_mean is not None
    assert result.running_mean.equal(mean)
    assert result.running_var is not None
    assert result.running_var.equal(var)
    assert result.num_batches_tracked is not None
    assert result.num_batches_tracked.equal(tracked)
    assert result.diagnostics() == {}
    inferred = batch_norm(input, mean, var)
    assert inferred.output.shape == shape
    assert inferred.mean is not None
    assert inferred.mean.equal(mean)


def test_inference_on_one_value_per_channel_and_with_eps_zero() -> None:
    result = batch_norm(torch.tensor([[3.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
    assert float(result.output) == 1.0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_non_finite_values_stay_in_their_channel(poison: float) -> None:
    input = _randn(8, 3, 4)
    clean = batch_norm(input, training=True)
    input[2, 1, 0] = poison
    result = batch_norm(input, torch.zeros(3), torch.ones(3), training=True)
    assert bool(result.output[:, 1].isnan().all())
    assert torch.allclose(result.output[:, ::2], clean.output[:, ::2], atol=5e-7)
    assert result.running_mean is not None
    assert result.running_mean.isfinite().tolist() == [True, False, True]
    expected = {"non_finite_channels": 1, "non_finite_values": 1, "nan_policy": "propagate"}
    assert result.diagnostics() == expected


def test_diagnostics_name_what_is_questionable() -> None:
    assert batch_norm(_randn(8, 3), training=True).diagnostics() == {}
    assert batch_norm(_randn(7, 3), training=True).diagnostics() == {"few_values_per_channel": 7}
    input = _randn(8, 3)
    input[:, 0] = 5
    input[:, 1] *= 1e-4
    expected = {"constant_channels": 1, "eps_dominated_channels": 2}
    assert batch_norm(input, training=True).diagnostics() == expected
    inferred = batch_norm(input[:2] * 1e-4, torch.zeros(3), torch.tensor([0.0, 0.9e-5, 1.1e-5]))
    assert inferred.diagnostics() == {"eps_dominated_channels": 2}


ZERO, ONE = torch.zeros(3), torch.ones(3)
REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "inference without statistics": (
        lambda: batch_norm(_randn(4, 3)),
        StatisticsError,
        r"running_mean: expected running statistics in inference \(training false\), received none",
    ),
    "only the mean": (
        lambda: batch_norm(_randn(4, 3), ZERO),
        StatisticsError,
        "running_var: expected to be given together with running_mean, received none",
    ),
    "only the variance": (
        lambda: batch_norm(_randn(4, 3), None, ONE, training=True),
        StatisticsError,
        "running_mean: expected to be given together with running_var, received none",
    ),
    "one value per channel": (
        lambda: batch_norm(_randn(1, 3, 1), training=True),
        StatisticsError,
        r"input: expected more than 1 value per channel when training, received shape \(1, 3, 1\)",
    ),
    "negative variance": (lambda: batch_norm(_randn(4, 3), ZERO, -ONE), StatisticsError, "running_var: .* received -1"),
    "NaN variance": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE * torch.nan, training=True),
        StatisticsError,
        "running_var: .* received nan",
    ),
    "cumulative without a count": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE, training=True, momentum=None),
        StatisticsError,
        "num_batches_tracked: .* received none",
    ),
    "negative count": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE, num_batches_tracked=torch.tensor(-2), training=True),
        StatisticsError,
        "num_batches_tracked: .* received -2",
    ),
    "rank": (lambda: batch_norm(_randn(3), ZERO, ONE), ShapeError, r"input: .* received shape \(3,\)"),
    "integer input": (
        lambda: batch_norm(torch.ones(4, 3, dtype=torch.int64), ZERO, ONE),
        DtypeError,
        "input: .* received int64",
    ),
    "channels of weight": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE, torch.ones(4)),
        ShapeError,
        r"weight: expected shape \(3,\), .* received shape \(4,\)",
    ),
    "channels of bias": (lambda: batch_norm(_randn(4, 3), ZERO, ONE, None, torch.ones(2)), ShapeError, "bias"),
    "channels of running_mean": (lambda: batch_norm(_randn(4, 3), torch.ones(1), ONE), ShapeError, "running_mean"),
    "channels of running_var": (lambda: batch_norm(_randn(4, 3), ZERO, torch.ones(1)), ShapeError, "running_var"),
    "channels along the axis": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE, channel_axis=0),
        ShapeError,
        r"running_mean: expected shape \(4,\)",
    ),
    "integer weight": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE, torch.ones(3, dtype=torch.int32)),
        DtypeError,
        "weight: .* received int32",
    ),
    "axis": (lambda: batch_norm(_randn(4, 3), ZERO, ONE, channel_axis=2), ParameterError, "channel_axis"),
    "eps zero in training": (
        lambda: batch_norm(_randn(4, 3), training=True, eps=0.0),
        ParameterError,
        "eps: expected a finite number > 0 in training, received 0.0",
    ),
    "eps negative": (lambda: batch_norm(_randn(4, 3), ZERO, ONE, eps=-1.0), ParameterError, "eps: .* received -1.0"),
    "eps NaN": (lambda: batch_norm(_randn(4, 3), ZERO, ONE, eps=torch.nan), ParameterError, "eps: .* received nan"),
    "momentum": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE, training=True, momentum=-0.1),
        ParameterError,
        "momentum: expected a number from 0 to 1, received -0.1",
    ),
    "momentum in inference": (lambda: batch_norm(_randn(4, 3), ZERO, ONE, momentum=2.0), ParameterError, "momentum"),
    "convention": (
        lambda: batch_norm(_randn(4, 3), ZERO, ONE, convention="flax"),
        ParameterError,
        "convention: expected one of torch, onnx, keras, received 'flax'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_batch_norm_refuses(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
