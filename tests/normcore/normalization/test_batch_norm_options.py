"""Batch norm's options: masks, policies for what is not finite, parameters per sample, the inverse, findings."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import BatchNormResult, batch_norm

ZERO, ONE = torch.zeros(3), torch.ones(3)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def _state(result: BatchNormResult) -> tuple[Tensor, Tensor]:
    assert result.running_mean is not None
    assert result.running_var is not None
    return result.running_mean, result.running_var


@pytest.mark.parametrize("shape", [(6,), (6, 5), (1, 5), (5,), (6, 1), ()], ids=str)
def test_mask_leaves_the_statistics_to_what_counts(shape: tuple[int, ...]) -> None:
    input = _randn(6, 3) if shape == (6,) else _randn(6, 3, 5)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = mask | ~mask.any()
    full = mask.expand([6] if input.ndim == 2 else [6, 5])
    counted = input.movedim(1, -1)[full]
    expected = batch_norm(counted, ZERO, ONE, training=True)
    result = batch_norm(input, ZERO, ONE, mask=mask, training=True)
    assert torch.allclose(result.output.movedim(1, -1)[full], expected.output)
    assert result.mean is not None
    assert result.invstd is not None
    per_channel = (-1,) if input.ndim == 2 else (-1, 1)
    everywhere = (input - result.mean.view(per_channel)) * result.invstd.view(per_channel)
    assert torch.allclose(result.output, everywhere)
    for name in ("mean", "var", "invstd", "running_mean", "running_var"):
        assert torch.allclose(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1.0), (-1e6, 1.0), (0.0, 1e19), (3.0, 1e-3)])
def test_mask_costs_no_digits(mean: float, std: float, memory_format: torch.memory_format) -> None:
    input = ((_randn(16, 3, 20, 20) - 1) * std + mean).float().to(memory_format=memory_format)
    mask = torch.rand((16, 20, 20), generator=torch.Generator().manual_seed(1)) > 0.6
    input[2, :, 3, 4] = 1e6 * std
    mask[2, 3, 4] = False
    grad_output = _randn(16, 3, 20, 20, seed=2).float()
    expected = batch_norm(input.double(), mask=mask, training=True, grad_output=grad_output.double())
    result = batch_norm(input, mask=mask, training=True, grad_output=grad_output)
    counted = mask[:, None].expand(input.shape)
    assert float((result.output - expected.output)[counted].abs().max()) <= 1e-6
    assert result.grad_input is not None
    assert expected.grad_input is not None
    assert result.grad_input.is_contiguous(memory_format=memory_format)
    error = (result.grad_input - expected.grad_input).abs().max() / expected.grad_input.abs().max()
    assert float(error) <= 1e-6


@pytest.mark.parametrize("value", [7.0, 0.1, -3e4])
def test_constant_values_that_count_give_exactly_the_bias(value: float) -> None:
    input, bias = _randn(16, 3, 50).float(), torch.tensor([0.3, 0.7, -0.1])
    mask = torch.rand((16, 50), generator=torch.Generator().manual_seed(1)) > 0.5
    input[:, 1][mask] = value
    result = batch_norm(input, None, None, None, bias, mask=mask, training=True)
    assert torch.equal(result.output[:, 1][mask], bias[1].expand(int(mask.sum())))
    assert result.diagnostics()["constant_channels"] == 1


def test_mask_follows_the_channel_axis() -> None:
    input = _randn(4, 5, 3)
    mask = torch.arange(20).view(4, 5) % 3 > 0
    result = batch_norm(input, mask=mask, training=True, channel_axis=-1)
    expected = batch_norm(input.movedim(-1, 1), mask=mask, training=True)
    assert torch.allclose(result.output.movedim(-1, 1), expected.output)


def test_what_does_not_count_may_be_anything() -> None:
    input = _randn(6, 3, 5)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[2:4, 3:] = False
    expected = batch_norm(input, ZERO, ONE, mask=mask, training=True, nan_policy="raise")
    input[2, :, 4], input[3, :, 3] = torch.nan, torch.inf
    result = batch_norm(input, ZERO, ONE, mask=mask, training=True, nan_policy="raise")
    assert all(map(torch.equal, _state(result), _state(expected)))
    is_finite = result.output.isfinite()
    assert torch.equal(result.output[is_finite], expected.output[is_finite])
    assert int((~is_finite).sum()) == 6


def test_mask_changes_no_inference() -> None:
    input, mask = _randn(6, 3), torch.zeros(6, dtype=torch.bool)
    assert torch.equal(batch_norm(input, ZERO, ONE, mask=mask).output, batch_norm(input, ZERO, ONE).output)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_skip_update_keeps_all_running_statistics(poison: float) -> None:
    input, tracked = _randn(8, 3), torch.tensor(4)
    input[5, 1] = poison
    spoiled = batch_norm(input, ZERO, ONE, num_batches_tracked=tracked, training=True)
    assert _state(spoiled)[0].isfinite().tolist() == [True, False, True]
    result = batch_norm(input, ZERO, ONE, num_batches_tracked=tracked, training=True, nan_policy="skip_update")
    assert torch.equal(_state(result)[0], ZERO.double())
    assert torch.equal(_state(result)[1], ONE.double())
    assert result.num_batches_tracked is not None
    assert int(result.num_batches_tracked) == 4
    assert result.output[:, ::2].isfinite().all()
    assert result.diagnostics() == {"non_finite_channels": 1, "non_finite_values": 1, "nan_policy": "skip_update"}
    sound = batch_norm(_randn(8, 3), ZERO, ONE, num_batches_tracked=tracked, training=True, nan_policy="skip_update")
    assert sound.num_batches_tracked is not None
    assert int(sound.num_batches_tracked) == 5


def test_inference_finds_values_that_are_not_finite() -> None:
    input = torch.full((8, 3), 3e38)
    assert "non_finite_values" not in batch_norm(input, ZERO, ONE).diagnostics()
    input[1, 2] = torch.nan
    assert batch_norm(input, ZERO, ONE).diagnostics()["non_finite_values"] == 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (70, 3, 20, 20)], ids=str)
def test_parameters_per_sample_are_those_of_each(shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> None:
    input = _randn(*shape).to(dtype)
    weight, bias = _randn(shape[0], 3, seed=1).float(), _randn(shape[0], 3, seed=2).float()
    result = batch_norm(input, ZERO, ONE, weight, bias, training=training)
    plain = batch_norm(input.double(), ZERO, ONE, training=training).output
    view = (*weight.shape, *[1] * (input.ndim - 2))
    expected = plain * weight.view(view) + bias.view(view)
    bound = {torch.float16: 2e-2, torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    assert torch.allclose(result.output.double(), expected, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=bound)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 4e-15), (torch.float16, 2e-2)])
def test_inverse_is_the_way_back(dtype: torch.dtype, bound: float, memory_format: torch.memory_format) -> None:
    input = _randn(4, 3, 5, 6).to(dtype).to(memory_format=memory_format)
    mean, var = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.1, 1.0, 4.0])
    weight, bias = torch.tensor([0.5, -2.0, 1.5]), torch.tensor([1.0, 0.0, -1.0])
    for affine in (
        (weight, bias),
        (None, None),
        (weight, None),
        (None, bias),
        (weight.expand(4, 3), bias.expand(4, 3)),
    ):
        output = batch_norm(input, mean, var, *affine).output
        back = batch_norm(output, mean, var, *affine, inverse=True)
        assert back.output.dtype == dtype
        assert back.output.is_contiguous(memory_format=memory_format)
        assert float((back.output - input).abs().max()) <= bound
        assert back.mean is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_inverse_is_rounded_once_however_much_cancels(dtype: torch.dtype) -> None:
    mean, var = torch.tensor([0.5, -100.0, 2e3]), torch.tensor([0.1, 9000.0, 4e6])
    weight, bias = torch.tensor([0.5, -2.0, 1.5]), torch.tensor([1.0, 0.1, -1.0])
    output = _randn(400, 3).to(dtype)
    exact = (output.double() - bias) / weight * (var.double() + 1e-5).sqrt() + mean
    found = batch_norm(output, mean, var, weight, bias, inverse=True).output
    assert found.equal(exact.to(dtype))


def test_inverse_heeds_the_policy_for_what_is_not_finite() -> None:
    with pytest.raises(StatisticsError, match=r"input: expected finite values \(nan_policy raise\), received 1 that"):
        batch_norm(torch.tensor([[1.0, math.nan]]), ZERO[:2], ONE[:2], inverse=True, nan_policy="raise")


def test_inverse_is_differentiable() -> None:
    leaves = tuple(term.requires_grad_() for term in (_randn(4, 3), _randn(3, seed=1), _randn(3, seed=2)))

    def inverse(*leaves: Tensor) -> Tensor:
        input, weight, bias = leaves
        return batch_norm(input, ZERO, ONE, weight, bias, inverse=True).output

    assert torch.autograd.gradcheck(inverse, leaves)
    assert torch.autograd.gradgradcheck(inverse, leaves)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_weight_of_the_deviation_and_bias_of_the_mean_give_the_input_back(training: bool) -> None:
    input = _randn(6, 3, 5)
    mean, var = _randn(3, seed=1), _randn(3, seed=2).square()
    first = batch_norm(input, mean, var, training=training)
    assert first.mean is not None
    assert first.var is not None
    output = batch_norm(input, mean, var, (first.var + 1e-5).sqrt(), first.mean, training=training).output
    assert torch.allclose(output, input, atol=1e-14)


def test_training_output_ignores_scale_and_shift_of_the_input() -> None:
    input = _randn(50, 3)
    expected = batch_norm(input, training=True, eps=1e-300).output
    assert torch.allclose(batch_norm(input * 7e3 - 1e3, training=True, eps=1e-300).output, expected, atol=1e-12)
    assert torch.allclose(batch_norm(input * -1e-3, training=True, eps=1e-300).output, -expected, atol=1e-12)


def test_findings_measure_the_distance_to_the_running_statistics() -> None:
    input = _randn(500, 3).float()
    assert batch_norm(input, torch.full((3,), 1.0), torch.full((3,), 4.0), training=True).diagnostics() == {}
    far = batch_norm(input, torch.tensor([1.0, 11.0, 1.0]), torch.tensor([4.0, 4.0, 0.04]), training=True)
    findings = far.diagnostics()
    assert findings["running_mean_distance"] == pytest.approx(5, rel=0.1)
    assert findings["running_var_ratio"] == pytest.approx(100, rel=0.2)
    assert set(findings) == {"running_mean_distance", "running_var_ratio"}
    narrow = batch_norm(input, torch.ones(3), torch.full((3,), 400.0), training=True)
    assert narrow.diagnostics() == {"running_var_ratio": pytest.approx(100, rel=0.2)}


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 300.0), (torch.float16, 2e3), (torch.float32, 2e7)])
def test_findings_name_a_datatype_that_cannot_hold_the_spread(dtype: torch.dtype, mean: float) -> None:
    sound = (_randn(500, 3) / 2).to(dtype)
    assert batch_norm(sound, training=True).diagnostics() == {}
    coarse = sound.double()
    coarse[:, 1] += mean
    assert batch_norm(coarse.to(dtype), training=True).diagnostics() == {"unresolved_channels": 1}


@pytest.mark.parametrize("elements", [60, 2**18])
def test_findings_count_the_tails_of_the_output(elements: int) -> None:
    input = _randn(elements // 6, 6, seed=3).float()
    assert batch_norm(input * 10, training=True).diagnostics() == {}
    findings = batch_norm(input, None, None, torch.full((6,), 6.0), training=True).diagnostics()
    assert set(findings) == {"share_beyond_4_before", "share_beyond_4_after"}
    slack = 0.2 if elements == 60 else 0.02
    assert findings["share_beyond_4_before"] == pytest.approx(0.073, abs=slack)
    assert findings["share_beyond_4_after"] == pytest.approx(0.505, abs=slack)


def test_a_sample_for_the_tails_meets_all_channels() -> None:
    input, weight = _randn(2**17, 2, seed=3).float(), torch.tensor([0.1, 8.0])
    findings = batch_norm(input, None, None, weight, training=True).diagnostics()
    assert findings["share_beyond_4_after"] == pytest.approx(0.309, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_negative_variance_is_taken_where_it_is_allowed(dtype: torch.dtype) -> None:
    input = _randn(6, 5, 4, 4).to(dtype)
    var = torch.tensor([1.0, -1e-3, -2.0, torch.nan, 0.5])
    with pytest.raises(StatisticsError, match=r"running_var: expected values >= 0, received -0\.001"):
        batch_norm(input, torch.zeros(5), var, eps=0.01)
    result = batch_norm(input, torch.zeros(5), var, eps=0.01, allow_negative_var=True, grad_output=input)
    assert result.grad_input is not None
    for found in (result.output, result.grad_input):
        assert found.isnan().all((0, 2, 3)).tolist() == [False, False, True, True, False]
        for channel in (0, 1, 4):
            expected = input[:, channel].double() / (float(var[channel]) + 0.01) ** 0.5
            bound = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
            assert float((found[:, channel].double() - expected).abs().max() / expected.abs().max()) <= bound
    assert result.diagnostics()["non_finite_channels"] == 2
    back = batch_norm(result.output, torch.zeros(5), var, eps=0.01, allow_negative_var=True, inverse=True).output
    assert back.isnan().all((0, 2, 3)).tolist() == [False, False, True, True, False]


def test_a_negative_variance_that_is_allowed_moves_in_training() -> None:
    input, var = _randn(8, 2), torch.tensor([1.0, -2.0], dtype=torch.float64)
    result = batch_norm(input, torch.zeros(2), var, training=True, momentum=0.5, allow_negative_var=True)
    assert torch.allclose(_state(result)[1], 0.5 * var + 0.5 * input.var(0))
    assert bool(result.output.isfinite().all())
    assert "running_mean_distance" not in result.diagnostics()


def _normalize(**options: object) -> Callable[[], object]:
    defaults: dict[str, object] = {"running_mean": ZERO, "running_var": ONE}
    return lambda: batch_norm(_randn(4, 3, 5), **(defaults | options))  # type: ignore[arg-type]  # refused at run time


REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "mask of numbers": (_normalize(mask=torch.ones(4, 5)), DtypeError, "mask: expected bool, received float32"),
    "mask of another size": (
        _normalize(mask=torch.ones(4, 4, dtype=torch.bool)),
        ShapeError,
        r"mask: expected a shape that broadcasts to \(4, 5\), .* received shape \(4, 4\)",
    ),
    "mask with channels": (_normalize(mask=torch.ones(4, 3, 5, dtype=torch.bool)), ShapeError, "mask"),
    "mask of one position": (
        _normalize(mask=torch.arange(20).view(4, 5) == 2, training=True),
        StatisticsError,
        "mask: expected more than 1 counted value per channel when training, received 1",
    ),
    "mask of nothing": (
        _normalize(mask=torch.zeros(5, dtype=torch.bool), training=True),
        StatisticsError,
        "mask: .* received 0",
    ),
    "policy": (
        _normalize(nan_policy="ignore"),
        ParameterError,
        "nan_policy: expected one of propagate, raise, skip_update, received 'ignore'",
    ),
    "weights of too few samples": (
        _normalize(weight=torch.ones(3, 3)),
        ShapeError,
        r"weight: expected shape \(4, 3\), one value per sample and channel",
    ),
    "weights of samples along the channels": (
        _normalize(weight=torch.ones(4, 3), channel_axis=0, running_mean=torch.zeros(4), running_var=torch.ones(4)),
        ShapeError,
        "weight",
    ),
    "weight and bias of two shapes": (
        _normalize(weight=torch.ones(4, 3), bias=ZERO),
        ShapeError,
        r"bias: expected the weight's shape \(4, 3\), received shape \(3,\)",
    ),
    "inverse in training": (
        _normalize(inverse=True, training=True),
        ParameterError,
        "inverse: expected false with training, received true",
    ),
    "inverse with a gradient": (_normalize(inverse=True, grad_output=_randn(4, 3, 5)), ParameterError, "grad_output"),
    "inverse of nothing": (
        _normalize(inverse=True, weight=torch.tensor([1.0, 0.0, 0.0])),
        ParameterError,
        "weight: expected no 0 with inverse.*, received 2 zeros",
    ),
    "inverse without statistics": (
        lambda: batch_norm(_randn(4, 3), inverse=True),
        StatisticsError,
        "running_mean: .* received none",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_policy_raise_refuses_values_that_are_not_finite(training: bool) -> None:
    input = _randn(4, 3, 5)
    batch_norm(input, ZERO, ONE, training=training, nan_policy="raise")
    input[0, 0, 0], input[1, 2, 3] = torch.nan, torch.inf
    message = r"input: expected finite values \(nan_policy raise\), received 2 that are not finite"
    with pytest.raises(StatisticsError, match=message):
        batch_norm(input, ZERO, ONE, training=training, nan_policy="raise")
