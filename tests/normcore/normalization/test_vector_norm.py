"""Division by norms: the compiled sweeps equal plain operations in every layout, datatype and range."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normcore.normalization.vector_norm import Norm

ORDERS = pytest.mark.parametrize("p", [1, 2, math.inf], ids=["1", "2", "inf"])
BOUNDS = {torch.float64: 3e-14, torch.float32: 3e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "channels last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "transposed": lambda values: values.transpose(0, 3).contiguous().transpose(0, 3),
    "every other": lambda values: values.repeat_interleave(2, 3)[..., ::2],
    "backwards": lambda values: values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reference(
    values: Tensor, factor: Tensor | None, grad_output: Tensor, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Output, norms and gradients by autograd of the formula in float64; no vector is zero."""
    values = values.detach().double().clone().requires_grad_()
    factor = None if factor is None else factor.double().clone().requires_grad_()
    norms = torch.linalg.vector_norm(values, ord=norm.p, dim=norm.axes, keepdim=True)
    output = values / norms.clamp_min(norm.eps) * (1.0 if factor is None else factor)
    leaves = [values] if factor is None else [values, factor]
    grads = torch.autograd.grad(output, leaves, grad_output.double())
    return output.detach(), norms.detach(), grads[0], None if factor is None else grads[1]


@ORDERS
@pytest.mark.parametrize("axes", [(0,), (1,), (3,), (1, 2, 3), (0, 1, 2), (0, 2, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_formula(layout: Callable[[Tensor], Tensor], axes: tuple[int, ...], p: float) -> None:
    values, grad_output = layout(_randn(3, 5, 4, 7)), layout(_randn(3, 5, 4, 7, seed=1))
    norm = Norm(p, axes)
    factor = _randn(3, 5, 4, 7, seed=2).sum(axes, keepdim=True)
    expected = _reference(values, factor, grad_output, norm)
    found = (*norm.divide(values, factor), *norm.gradients(grad_output, values, factor))
    assert found[0].stride() == torch.empty_like(values).stride()
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-13)


@ORDERS
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 700), (3, 1100, 1), (5, 3, 256), (1, 1, 1)], ids=str)
def test_every_datatype_is_rounded_once(shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    # Powers of two make norms on both sides of eps.
    values = (_randn(*shape) * torch.logspace(-8, 8, shape[2], 2)).to(dtype)
    grad_output = _randn(*shape, seed=1).to(dtype)
    norm = Norm(p, (1,), eps=0.3)
    output, norms, grad_input, _ = _reference(values, None, grad_output, norm)
    found, found_norms = norm.divide(values)
    found_grad, none = norm.gradients(grad_output, values)
    assert none is None
    assert found.dtype == found_grad.dtype == dtype
    torch.testing.assert_close(found.double(), output, rtol=BOUNDS[dtype], atol=6e-8 if dtype == torch.float16 else 0)
    torch.testing.assert_close(found_norms.double(), norms, rtol=2e-7, atol=0)
    scale = (1 / norms.clamp_min(0.3)) * grad_output.double().abs().amax(1, keepdim=True)
    assert float(((found_grad.double() - grad_input) / scale).abs().max()) <= BOUNDS[dtype]


@ORDERS
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
def test_zeros_stay_zeros_beside_others(shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    values = _randn(*shape).to(dtype)
    values[1] = 0
    for eps in (0.0, 0.5):
        norm = Norm(p, (1,), eps)
        output, _ = norm.divide(values)
        grad_input, _ = norm.gradients(torch.ones_like(values), values)
        assert not output[1].any()
        assert not grad_input[1].any()
        assert output[[0, 2, 3]].all()
        assert grad_input.isfinite().all()


@ORDERS
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float64, scale) for scale in (1e300, 1e-300)),
        *((dtype, scale) for dtype in (torch.float32, torch.bfloat16) for scale in (1e37, 1e-37)),
        *((torch.float16, scale) for scale in (1e4, 1e-3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("axis", [0, 1])
def test_no_scale_matters(axis: int, dtype: torch.dtype, scale: float, p: float) -> None:
    values, grad_output = _randn(4, 5), _randn(4, 5, seed=1).to(dtype)
    norm = Norm(p, (axis,))
    scaled = (values * scale).to(dtype)
    with torch.inference_mode():
        output, _ = norm.divide(scaled.clone())
        grad_input, _ = norm.gradients(grad_output.clone(), scaled.clone())
    expected = _reference(scaled.double() / scale, None, grad_output, norm)
    bound = 10 * BOUNDS[dtype]
    torch.testing.assert_close(output.double(), expected[0], rtol=bound, atol=0)
    torch.testing.assert_close(grad_input.double() * scale, expected[2], rtol=bound, atol=bound)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_threads_change_no_bit(axis: int, threads: int) -> None:
    values = _randn(30, 70, 300).float()
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append((Norm(2, (axis,)).divide(values)[0], Norm(2, (axis,)).gradients(values.sin(), values)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))
