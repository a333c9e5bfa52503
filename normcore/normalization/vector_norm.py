"""Vectors divided by their norms, which neither overflow nor underflow; differentiable to every order."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normcore._checks import refuse_tangents
from normcore._precision import accumulation_dtype

# Squares of float64 norms within these bounds stay clear of the datatype's own.
_LEAST, _LARGEST = 1e-140, 1e140


@dataclass(frozen=True, slots=True)
class Norm:
    """Which norm divides: of order p (1, 2 or infinity) over axes from the front, and never less than eps."""

    p: float
    axes: tuple[int, ...]
    eps: float = 0.0

    def divide(
        self, values: Tensor, factor: Tensor | None = None, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Values over their norms, times a factor per vector; and the norms, without gradient.

        Zeros with gradient 0 where a norm is 0. The norms are float32 (float64 for float64 values), with 1 along the
        axes, and infinite where the datatype cannot hold them. A factor is of their shape. `out` takes the quotients
        where nothing is recorded; it has the strides of a new tensor like the values.
        """
        if not _is_recorded(values, factor):
            return _unrecorded(values, factor, self, out)
        if not _is_compiled(values):
            return _divide(values, factor, self)
        output, norms = _Divide.apply(values, factor, self)  # type: ignore[no-untyped-call]  # torch's has no types
        return output, norms

    def gradients(
        self, grad_output: Tensor, values: Tensor, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Those of the values and the factor, in their datatypes.

        dx = factor * (dy - <dy, y> w) / norm, with y = x / norm and w = d norm / dx = sign(x) |y|^(p - 1);
        the factor's is <dy, y>
        """
        found = None
        if _is_compiled(values) and not _is_recorded(grad_output, values, factor):
            found = _compiled_gradients(grad_output, values, factor, self)
        return _differentiated(grad_output, values, factor, self) if found is None else found


def _is_compiled(values: Tensor) -> bool:
    return values.numel() > 0 and values.device.type == "cpu"


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see what is done with the tensors."""
    refuse_tangents(*tensors)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, factor)
        ctx.norm = norm
        output, norms = _unrecorded(values, factor, norm)
        ctx.mark_non_differentiable(norms)
        return output, norms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, factor = ctx.saved_tensors
        return (*ctx.norm.gradients(grads[0], values, factor), None)


def _unrecorded(values: Tensor, factor: Tensor | None, norm: Norm, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    found = _compiled_divide(values, factor, norm, out) if _is_compiled(values) else None
    output, norms = _divide(values, factor, norm) if found is None else found
    return output if out is None or output is out else out.copy_(output), norms


@torch.no_grad()
def _compiled_divide(
    values: Tensor, factor: Tensor | None, norm: Norm, out: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """None where the sums leave float64."""
    from normcore.normalization.vector_kernels import divide_vectors, sweep

    vectors = _Vectors.of(values, norm.axes)
    is_taken = out is not None and out.stride() == vectors.values.stride()
    output = out if out is not None and is_taken else torch.empty_like(vectors.values)
    norms = vectors.per_vector(accumulation_dtype(values.dtype))
    factors = None if factor is None else vectors.per_vector(torch.float64).copy_(factor)
    sweep(divide_vectors, vectors.sizes, (vectors.values, output, norms, factors), norm.p, norm.eps)
    return (_laid_out_as(values, output), norms) if _is_in_range(values, norms) else None


@torch.no_grad()
def _compiled_gradients(
    grad_output: Tensor, values: Tensor, factor: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None] | None:
    """None where the sums leave float64."""
    from normcore.normalization.vector_kernels import divide_gradients, sweep

    vectors = _Vectors.of(values, norm.axes)
    gradient = torch.empty_like(vectors.values)
    norms, projections = (vectors.per_vector(torch.float64) for _ in range(2))
    factors = None if factor is None else vectors.per_vector(torch.float64).copy_(factor)
    operands = (_laid_out_as(vectors.values, grad_output), vectors.values)
    sweep(divide_gradients, vectors.sizes, (*operands, gradient, norms, projections, factors), norm.p, norm.eps)
    if not _is_in_range(values, norms):
        return None
    return _laid_out_as(values, gradient), None if factor is None else projections.to(factor.dtype)


def _is_in_range(values: Tensor, norms: Tensor) -> bool:
    """Whether no sum overflowed or sank; those of other datatypes than float64 cannot."""
    return values.dtype != torch.float64 or bool(((norms > _LEAST) & (norms < _LARGEST)).all())


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Dense values whose memory is (outer, length, inner), with vectors along the middle."""

    values: Tensor
    axes: tuple[int, ...]
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, values: Tensor, axes: tuple[int, ...]) -> "_Vectors":
        """The values themselves, or a copy where their strides do not allow it."""
        order = sorted((axis for axis in range(values.ndim) if values.shape[axis] > 1), key=values.stride, reverse=True)
        others = [axis for axis in order if axis not in axes]
        first = next((place for place, axis in enumerate(order) if axis in axes), len(order))
        inside = order[first : first + len(order) - len(others)]
        if not set(inside) <= set(axes) or not _is_dense(values, order):
            order, first, inside = [*others, *sorted(axes)], len(others), sorted(axes)
            values = _in_order(values, order)
        sizes = [values.shape[axis] for axis in order]
        last = first + len(inside)
        return cls(values, axes, (math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:])))

    def per_vector(self, dtype: torch.dtype) -> Tensor:
        """One value per vector in memory order, with 1 along the axes."""
        shape = [1 if axis in self.axes else size for axis, size in enumerate(self.values.shape)]
        if self.values.is_contiguous():
            return torch.empty(shape, dtype=dtype)
        strides, total = [1] * len(shape), 1
        for axis in sorted(range(len(shape)), key=self.values.stride):
            strides[axis] = total
            total *= shape[axis]
        return torch.empty_strided(shape, strides, dtype=dtype)


def _is_dense(values: Tensor, order: list[int]) -> bool:
    total = 1
    for axis in reversed(order):
        if values.stride(axis) != total:
            return False
        total *= values.shape[axis]
    return True


def _in_order(values: Tensor, order: list[int]) -> Tensor:
    """A copy whose memory has the axes in this order; axes of size 1 that it leaves out come first."""
    order = [axis for axis in range(values.ndim) if axis not in order] + order
    inverse = sorted(range(values.ndim), key=order.__getitem__)
    return values.permute(order).contiguous().permute(inverse)


def _laid_out_as(like: Tensor, values: Tensor) -> Tensor:
    """The values with the strides that a new tensor like the other one has."""
    return values if values.stride() == like.stride() else torch.empty_like(like, dtype=values.dtype).copy_(values)


def _divide(values: Tensor, factor: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The same in plain differentiable operations, in float64; vectors are scaled by powers of two."""
    wide = values.double()
    peak = wide.detach().abs()
    peak = peak.amax(norm.axes, keepdim=True) if values.numel() else peak.sum(norm.axes, keepdim=True)
    is_zero = peak == 0
    scale = _powers_of_two(peak)
    scaled = wide / scale
    scaled_norms = _norms(scaled, norm).masked_fill(is_zero, 1.0)
    norms = (scaled_norms.detach() * scale).masked_fill(is_zero, 0.0)
    output = scaled / scaled_norms
    if norm.eps:
        output = torch.where(norms < norm.eps, wide / norm.eps, output)
    output = output.masked_fill(is_zero, 0.0)
    if factor is not None:
        output = output * factor
    return output.to(values.dtype), norms.to(accumulation_dtype(values.dtype))


def _norms(values: Tensor, norm: Norm) -> Tensor:
    if norm.p == 2:
        # Squares of zeros alone have no root with a derivative.
        squares = values.square().sum(norm.axes, keepdim=True)
        return squares.masked_fill(squares == 0, 1.0).sqrt()
    magnitudes = values.abs()
    if norm.p == 1 or not values.numel():
        return magnitudes.sum(norm.axes, keepdim=True)
    return magnitudes.amax(norm.axes, keepdim=True)


def _powers_of_two(peak: Tensor) -> Tensor:
    """The largest power of two that is not above each peak; 1 for a peak that is 0 or not finite."""
    exponent = torch.frexp(peak).exponent - 1
    return torch.where(peak.isfinite() & (peak > 0), torch.ldexp(torch.ones_like(peak), exponent), 1.0)


def _differentiated(
    grad_output: Tensor, values: Tensor, factor: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None]:
    """The gradients by autograd, and recorded by it where it has to see them."""
    is_recorded = _is_recorded(grad_output, values, factor)
    given = [values] if factor is None else [values, factor]
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaves = [leaf if is_recorded and leaf.requires_grad else leaf.clone().detach() for leaf in given]
        for leaf in leaves:
            if not leaf.requires_grad:
                leaf.requires_grad_()
        output, _ = _divide(leaves[0], leaves[1] if factor is not None else None, norm)
        grad_output = grad_output.to(output.dtype) if is_recorded else grad_output.clone().to(output.dtype)
        grads = torch.autograd.grad(output, leaves, grad_output, create_graph=is_recorded)
    return grads[0], grads[1] if factor is not None else None
