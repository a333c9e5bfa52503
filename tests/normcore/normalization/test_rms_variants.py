"""RMS norm as language models have it: 1 + weight, and a rounding before the weight; against the formulas."""

import pytest
import torch
from torch import Tensor

from normcore.errors import DtypeError
from normcore.normalization import rms_norm

EPS = 1e-6
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _normalized(input: Tensor) -> Tensor:
    values = input.double()
    return values / (values.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_the_factor_may_be_one_plus_the_weight(dtype: torch.dtype, bound: float) -> None:
    input, weight, grad_output = (_randn(*shape).to(dtype) for shape in ((6, 40), (40,), (6, 40)))
    wide = [term.double().clone().requires_grad_() for term in (input, weight)]
    expected = _normalized(wide[0]) * (1 + wide[1])
    references = torch.autograd.grad(expected, wide, grad_output.double())
    expected = expected.detach()
    result = rms_norm(input, weight, grad_output, eps=EPS, weight_plus_one=True)
    leaves = [term.clone().requires_grad_() for term in (input, weight)]
    output = rms_norm(*leaves, eps=EPS, weight_plus_one=True).output
    found = torch.autograd.grad(output, leaves, grad_output)
    assert torch.equal(output, result.output)
    assert float((result.output - expected).abs().max()) <= bound * float(expected.abs().max())
    for gradient, own, reference in zip(found, (result.grad_input, result.grad_weight), references, strict=True):
        assert own is not None
        for computed in (gradient, own):
            assert computed.dtype == dtype
            assert float((computed - reference).abs().max()) <= 10 * bound * float(reference.abs().max())


@HALF
def test_a_small_weight_of_half_precision_is_not_lost_beside_one(dtype: torch.dtype) -> None:
    input, weight = _randn(4, 64).to(dtype), torch.full((64,), 2.0**-12, dtype=dtype)
    found = rms_norm(input, weight, eps=EPS, weight_plus_one=True).output
    assert torch.equal(found, (_normalized(input) * (1 + 2.0**-12)).to(dtype))


@HALF
def test_the_rounding_before_the_weight_is_the_models_own(dtype: torch.dtype) -> None:
    input, weight = _randn(64, 256).to(dtype), (1 + _randn(256, seed=1) / 3).to(dtype)
    found = rms_norm(input, weight, eps=EPS, cast_before_scale=True).output
    expected = _normalized(input).to(dtype) * weight
    assert found.dtype == dtype
    assert float((found == expected).double().mean()) > 0.999
    once = rms_norm(input, weight, eps=EPS).output
    assert float((once == expected).double().mean()) < 0.9
    assert torch.equal(rms_norm(input, eps=EPS, cast_before_scale=True).output, rms_norm(input, eps=EPS).output)


def test_both_variants_together_and_into_an_output() -> None:
    input, weight = _randn(8, 32).bfloat16(), _randn(32, seed=1).bfloat16() / 4
    out = torch.empty_like(input)
    options = {"eps": EPS, "weight_plus_one": True, "cast_before_scale": True}
    result = rms_norm(input, weight, out=out, **options)  # type: ignore[arg-type]  # mypy takes all options alike
    assert result.output is out
    expected = (_normalized(input).bfloat16().double() * (1 + weight.double())).bfloat16()
    assert float((out == expected).double().mean()) > 0.99


def test_derivatives_are_those_without_the_rounding() -> None:
    input, weight = (_randn(*shape).requires_grad_() for shape in ((3, 5), (5,)))

    def output(input: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(input, weight, eps=0.1, cast_before_scale=True, weight_plus_one=True).output

    assert torch.autograd.gradcheck(output, (input, weight))
    assert torch.autograd.gradgradcheck(output, (input, weight))
    half, grad_output = input.detach().bfloat16(), _randn(3, 5, seed=3).bfloat16()
    cast = rms_norm(half, weight.detach(), grad_output, cast_before_scale=True)
    plain = rms_norm(half, weight.detach(), grad_output)
    for name in ("grad_input", "grad_weight"):
        assert torch.equal(getattr(cast, name), getattr(plain, name))


def test_a_weight_of_integers_is_refused() -> None:
    with pytest.raises(DtypeError, match=r"weight: .* received int32"):
        rms_norm(torch.ones(2, 3), torch.ones(3, dtype=torch.int32), weight_plus_one=True)
