"""Batch renormalization against its formula, and the batch norm that it is at its bounds."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import BatchRenormResult, batch_norm, batch_renorm
from tests.normcore.normalization import oracle

EPS = 1e-3
MEAN, VAR = torch.tensor([0.0, 2.0, -5.0]), torch.tensor([1.0, 0.1, 30.0])


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def _primitive(input: Tensor, weight: Tensor, bias: Tensor, *, rmax: float, dmax: float) -> Tensor:
    axes = (0, *range(2, input.ndim))
    mean = input.mean(axes, keepdim=True)
    std = ((input - mean).square().mean(axes, keepdim=True) + EPS).sqrt()
    view = mean.shape
    kept_mean, kept_std = MEAN.double().view(view), (VAR.double() + EPS).sqrt().view(view)
    r = (std / kept_std).clamp(1 / rmax, rmax).detach()
    d = ((mean - kept_mean) / kept_std).clamp(-dmax, dmax).detach()
    return ((input - mean) / std * r + d) * weight.view(view) + bias.view(view)


def _train(input: Tensor, *affine: Tensor, rmax: float = 1.5, dmax: float = 0.5) -> BatchRenormResult:
    return batch_renorm(input, MEAN, VAR, *affine, rmax=rmax, dmax=dmax, training=True, eps=EPS)


@pytest.mark.parametrize(("rmax", "dmax"), [(1.5, 0.5), (3.0, 5.0), (1e9, 1e9), (1.0, 0.0)])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 2)], ids=str)
def test_output_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], rmax: float, dmax: float) -> None:
    leaves = tuple(term.requires_grad_() for term in (_randn(*shape), _randn(3, seed=1), _randn(3, seed=2)))

    def output(*leaves: Tensor) -> Tensor:
        return _train(*leaves, rmax=rmax, dmax=dmax).output

    expected = _primitive(*leaves, rmax=rmax, dmax=dmax)
    assert torch.allclose(output(*leaves), expected, atol=1e-12)
    grad_output = _randn(*shape, seed=3)
    references = torch.autograd.grad(expected, leaves, grad_output)
    found = torch.autograd.grad(output(*leaves), leaves, grad_output)
    with torch.inference_mode():
        input, *affine = (leaf.detach() for leaf in leaves)
        result = batch_renorm(
            input, MEAN, VAR, *affine, grad_output=grad_output, rmax=rmax, dmax=dmax, training=True, eps=EPS
        )
    closed = (result.grad_input, result.grad_weight, result.grad_bias)
    for reference, gradient, own in zip(references, found, closed, strict=True):
        assert own is not None
        assert torch.allclose(gradient, reference, atol=1e-11)
        assert torch.allclose(own, reference, atol=1e-11)


def test_derivatives_of_the_second_order_take_r_and_d_for_constants() -> None:
    # A difference quotient moves r and d, which the formula holds constant; so autograd of the formula is compared.
    leaves = tuple(term.requires_grad_() for term in (_randn(5, 3), _randn(3, seed=1), _randn(3, seed=2)))

    def second(normalize: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(normalize(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(term.pow(2).sum() for term in first), leaves)  # type: ignore[arg-type]  # not 0

    found = second(lambda *leaves: _train(*leaves).output)
    expected = second(lambda *leaves: _primitive(*leaves, rmax=1.5, dmax=0.5))
    for gradient, reference in zip(found, expected, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-10)


def test_without_bounds_training_gives_what_inference_does() -> None:
    input = _randn(8, 3, 5)
    expected = batch_renorm(input, MEAN, VAR, eps=EPS).output
    assert torch.allclose(_train(input, rmax=1e9, dmax=1e9).output, expected, atol=1e-12)


def test_at_rmax_1_and_dmax_0_it_is_batch_norm() -> None:
    input = _randn(8, 3, 5).float()
    result = _train(input, rmax=1.0, dmax=0.0)
    assert torch.equal(result.output, batch_norm(input, training=True, eps=EPS).output)
    assert result.r is not None
    assert result.d is not None
    assert torch.equal(result.r, torch.ones(3))
    assert int(result.d.count_nonzero()) == 0


def test_inference_is_that_of_batch_norm() -> None:
    input, weight = _randn(8, 3), torch.tensor([1.0, 2.0, 3.0])
    grad_output = _randn(8, 3, seed=1)
    result = batch_renorm(input, MEAN, VAR, weight, grad_output=grad_output)
    expected = batch_norm(input, MEAN, VAR, weight, grad_output=grad_output)
    for name in ("output", "mean", "var", "invstd", "grad_input", "grad_weight", "grad_bias"):
        assert torch.equal(getattr(result, name), getattr(expected, name))
    assert (result.r, result.d, result.running_mean, result.running_var) == (None, None, None, None)


def test_r_and_d_come_from_the_running_statistics_before_the_update_which_moves_the_deviation() -> None:
    input = _randn(50, 3)
    result = batch_renorm(input, MEAN, VAR, rmax=1e3, dmax=1e3, training=True, momentum=0.25, eps=EPS)
    mean, std = input.mean(0), (input.var(0, correction=0) + EPS).sqrt()
    kept = (VAR.double() + EPS).sqrt()
    assert result.r is not None
    assert result.d is not None
    assert torch.allclose(result.r, std / kept)
    assert torch.allclose(result.d, (mean - MEAN) / kept)
    assert result.running_mean is not None
    assert result.running_var is not None
    assert torch.allclose(result.running_mean, 0.75 * MEAN + 0.25 * mean)
    assert torch.allclose((result.running_var + EPS).sqrt(), 0.75 * kept + 0.25 * std)


def test_running_variance_never_falls_below_zero() -> None:
    # The square of a root is off by a last place, to either side, depending on eps.
    for index in range(20):
        eps = 1e-5 * 1.1**index
        result = batch_renorm(torch.full((4, 1), 5.0), torch.zeros(1), torch.zeros(1), training=True, eps=eps)
        assert result.running_var is not None
        assert 0.0 <= float(result.running_var) <= 1e-18


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_float32_is_accurate_at_any_mean(mean: float) -> None:
    input = (_randn(20, 3, 12, 12) + mean).float()
    running_mean, running_var = torch.full((3,), mean + 0.5), torch.tensor([1.0, 2.0, 8.0])
    result = batch_renorm(input, running_mean, running_var, training=True, eps=EPS)
    batch_mean, batch_var = oracle.batch_statistics(input)
    std = np.sqrt(oracle.exact(running_var) + np.longdouble(EPS))
    batch_std = np.sqrt(batch_var + np.longdouble(EPS))
    r = np.clip(batch_std / std, 1 / np.longdouble(3), 3)
    d = np.clip((batch_mean - oracle.exact(running_mean)) / std, -5, 5)
    expected = oracle.normalized(input, batch_mean, batch_var, r, d, eps=EPS)
    assert np.abs(oracle.exact(result.output) - expected).max() <= 1.5e-6


def test_clipped_channels_are_counted() -> None:
    findings = _train(_randn(100, 3)).diagnostics()
    assert findings["r_clipped_channels"] == 3
    assert findings["d_clipped_channels"] == 3
    assert "r_clipped_channels" not in _train(_randn(100, 3), rmax=1e6, dmax=1e6).diagnostics()
    assert not batch_renorm(_randn(100, 3), torch.ones(3), torch.full((3,), 4.0), training=True).diagnostics()


def test_empty_batch_and_skipped_update_change_nothing() -> None:
    grad_output = torch.empty(0, 3)
    empty = batch_renorm(torch.empty(0, 3), MEAN, VAR, training=True, grad_output=grad_output)
    assert empty.output.shape == (0, 3)
    assert empty.grad_weight is not None
    assert torch.equal(empty.grad_weight, torch.zeros(3))
    input = _randn(8, 3).float()
    input[0, 0] = torch.nan
    skipped = batch_renorm(input, MEAN, VAR, training=True, nan_policy="skip_update")
    for result in (empty, skipped):
        assert result.running_mean is not None
        assert result.running_var is not None
        assert torch.equal(result.running_mean, MEAN)
        assert torch.equal(result.running_var, VAR)
    poisoned = batch_renorm(input, MEAN, VAR, training=True)
    assert poisoned.running_mean is not None
    assert poisoned.running_mean.isnan().tolist() == [True, False, False]


def test_mask_and_parameters_per_sample_are_those_of_batch_norm() -> None:
    input, weight = _randn(6, 3, 4), _randn(6, 3, seed=1)
    mask = torch.arange(24).view(6, 4) % 5 > 0
    grad_output = _randn(6, 3, 4, seed=2)
    result = batch_renorm(
        input, MEAN, VAR, weight, mask=mask, training=True, rmax=1.0, dmax=0.0, grad_output=grad_output
    )
    expected = batch_norm(input, None, None, weight, mask=mask, training=True, grad_output=grad_output)
    for name in ("output", "mean", "var", "grad_input", "grad_weight", "grad_bias"):
        assert torch.allclose(getattr(result, name), getattr(expected, name), atol=1e-12)


def test_no_argument_is_changed() -> None:
    arguments = [_randn(6, 3), MEAN.clone(), VAR.clone(), _randn(3), _randn(3)]
    before = [argument.clone() for argument in arguments]
    batch_renorm(*arguments[:3], *arguments[3:], training=True, grad_output=_randn(6, 3))
    assert all(map(torch.equal, arguments, before))


def _call(**options: object) -> Callable[[], object]:
    defaults: dict[str, object] = {"input": _randn(4, 3), "running_mean": MEAN, "running_var": VAR, "training": True}
    return lambda: batch_renorm(**(defaults | options))  # type: ignore[arg-type]  # refused at run time


REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "no statistics": (
        _call(running_mean=None, running_var=None),
        StatisticsError,
        "running_mean: expected running statistics, received none",
    ),
    "rmax": (_call(rmax=0.9), ParameterError, "rmax: expected a number >= 1, received 0.9"),
    "rmax NaN": (_call(rmax=math.nan), ParameterError, "rmax"),
    "rmax of no number": (_call(rmax="3"), ParameterError, "rmax"),
    "dmax": (_call(dmax=-1), ParameterError, "dmax: expected a number >= 0, received -1"),
    "momentum": (_call(momentum=2.0), ParameterError, "momentum"),
    "eps": (_call(eps=0.0), ParameterError, "eps: .* in training"),
    "policy": (_call(nan_policy="never"), ParameterError, "nan_policy"),
    "one value": (_call(input=_randn(1, 3)), StatisticsError, "input: expected more than 1 value per channel"),
    "variance": (_call(running_var=-VAR), StatisticsError, "running_var"),
    "channels": (_call(running_mean=MEAN[:2]), ShapeError, "running_mean"),
    "weight": (_call(weight=torch.ones(2)), ShapeError, "weight"),
    "gradient": (_call(grad_output=_randn(3, 3)), ShapeError, "grad_output"),
    "mask": (_call(mask=torch.ones(4)), DtypeError, "mask"),
    "NaN": (_call(input=_randn(4, 3) * torch.nan, nan_policy="raise"), StatisticsError, "input: .* received 12"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
