"""Norms of vectors that neither overflow nor underflow, and division by them; differentiable to every order."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype


@dataclass(frozen=True, slots=True)
class VectorNorm:
    """The norm of each vector as scaled * scale; tensors with 1 along the vectors' axes.

    Attributes:
        scaled: norm of the vector over its scale.
        scale: powers of two, constants; None where all are 1.
        is_clamped: where a bound took the norm's place; None where nowhere.
    """

    scaled: Tensor
    scale: Tensor | None = None
    is_clamped: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The norm, without gradient; infinite where the datatype cannot hold it."""
        return (self.scaled if self.scale is None else self.scaled * self.scale).detach()

    def at_least(self, bound: float) -> "VectorNorm":
        """The norm, or the bound where a vector that is not zero has a smaller one."""
        norm = self.value
        is_clamped = (norm < bound) & (self.scaled != 0)
        if not bool(is_clamped.any()):
            return self
        scale = None if self.scale is None else self.scale.masked_fill(is_clamped, 1.0)
        return VectorNorm(self.scaled.masked_fill(is_clamped, bound), scale, is_clamped)

    def divide(self, values: Tensor, *, factor: Tensor | None = None) -> Tensor:
        """Values over the norms, 0 with gradient 0 where a norm is 0; in the datatype of the norms.

        A factor per vector, if any, is applied to the reciprocal of the norm.
        """
        # Values of a half type are promoted by the norms as they are divided: no copy of them is made.
        scaled_values = values if self.scale is None else values / self.scale
        is_zero = self.scaled == 0
        has_zeros = bool(is_zero.any())
        divisor = self.scaled.masked_fill(is_zero, 1.0) if has_zeros else self.scaled
        quotient = scaled_values / divisor if factor is None else scaled_values * (factor / divisor)
        return quotient.masked_fill(is_zero, 0.0) if has_zeros else quotient

    def gradient(self, grad_output: Tensor, values: Tensor, *, p: float, axes: tuple[int, ...]) -> Tensor:
        """The gradient of `divide(values)`, where the norms are those of the values themselves.

        dx = (dy - <dy, y> w) / norm, with w = d norm / dx = sign(x) |y|^(p - 1)
        """
        values, grad_output = values.to(self.scaled.dtype), grad_output.to(self.scaled.dtype)
        unit = self.divide(values)
        projection = (grad_output * unit).sum(axes, keepdim=True)
        if self.is_clamped is not None:
            projection = projection.masked_fill(self.is_clamped, 0.0)
        return self.divide(grad_output - projection * _slope(values, unit, p=p, axes=axes))


def vector_norm(values: Tensor, *, p: float, axes: tuple[int, ...]) -> VectorNorm:
    """Norms for p = 1, 2 or infinity over `axes`, counted from the front; float32, or float64 for float64 values."""
    dtype = accumulation_dtype(values.dtype)
    values = values.to(dtype)
    norm = VectorNorm(_norm(values, p=p, axes=axes))
    if math.isinf(p) or values.numel() == 0:
        return norm
    # Squares of what lies within these bounds stay clear of the datatype's own. Comparisons with NaN are false.
    limit = torch.finfo(dtype).max ** 0.4
    is_safe = (norm.scaled > 1 / limit) & (norm.scaled < limit)
    if bool(is_safe.all()):
        return norm
    scale = _powers_of_two(values.detach().abs().amax(axes, keepdim=True))
    return replace(norm, scaled=_norm(values / scale, p=p, axes=axes), scale=scale)


def _norm(values: Tensor, *, p: float, axes: tuple[int, ...]) -> Tensor:
    if math.isinf(p):
        # A maximum over nothing is an error.
        return values.abs().amax(axes, keepdim=True) if values.numel() else values.sum(axes, keepdim=True)
    if p == 1:
        return values.abs().sum(axes, keepdim=True)
    if _suits_vector_norm(values, axes=axes):
        norm: Tensor = torch.linalg.vector_norm(values, dim=axes, keepdim=True)
        return norm
    squares = values.square().sum(axes, keepdim=True)
    is_zero = squares == 0
    return squares.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def _suits_vector_norm(values: Tensor, *, axes: tuple[int, ...]) -> bool:
    """Whether torch's own norm is as exact; it is faster then.

    Over any axes but the last ones, and over many values, it adds one after the other: 1e-5 off for 1e6 of them. Its
    second derivative at 0 is NaN.
    """
    lengths = [values.shape[axis] for axis in axes]
    is_trailing = axes == tuple(range(values.ndim - len(axes), values.ndim))
    has_gradient = torch.is_grad_enabled() and values.requires_grad
    return is_trailing and values.is_contiguous() and torch.Size(lengths).numel() <= 2**14 and not has_gradient


def _powers_of_two(peak: Tensor) -> Tensor:
    """The largest power of two that is not above each peak; 1 for a peak that is 0 or not finite."""
    exponent = torch.frexp(peak).exponent - 1
    return torch.where(peak.isfinite() & (peak > 0), torch.ldexp(torch.ones_like(peak), exponent), 1.0)


def _slope(values: Tensor, unit: Tensor, *, p: float, axes: tuple[int, ...]) -> Tensor:
    """The norm's own derivative; values that share the largest magnitude share the slope."""
    if p == 2:
        return unit
    if p == 1:
        return values.sign()
    magnitude = values.abs()
    is_peak = magnitude == _norm(magnitude, p=p, axes=axes)
    return values.sign() * is_peak / is_peak.sum(axes, keepdim=True)
