"""The one standardize kernel, on tensors without gradient: y = (x - mean) * invstd * weight + bias.

On the CPU compiled sweeps do it, where the tensor is one of their boxes. Everything else, other devices and odd
layouts, takes the closed forms in plain torch operations in float64. Nothing here is recorded by autograd. Its
backward is `kernel_backward`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from normcore import _standardize
from normcore._plan import Operand, operand_of
from normcore.normalization import closed_forms
from normcore.normalization.closed_forms import Measured, Statistics


class Seen(NamedTuple):
    """In which shapes operands are seen, where those are not their own; kernels need no such views made.

    Attributes:
        view: that of the input, and of all that is like it.
        affine: that of weight and bias in front of the view.
        kept: that of given statistics in front of the view.
    """

    view: tuple[int, ...] | None = None
    affine: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None

    def values(self, tensor: Tensor) -> Tensor:
        return tensor if self.view is None else tensor.reshape(self.view)

    def parameter(self, tensor: Tensor | None) -> Tensor | None:
        return tensor if self.affine is None or tensor is None else tensor.reshape(self.affine)

    def front(self, tensor: Tensor | None) -> tuple[int, ...] | None:
        """The shape of weight or bias in front of the view, if there is one."""
        return None if tensor is None else self.affine or tensor.shape


AS_GIVEN = Seen()


class Standardized(NamedTuple):
    """An output of the input's shape and datatype, and the statistics, which broadcast against what is seen."""

    output: Tensor
    statistics: Statistics


def own_statistics(
    input: Tensor, *, axes: tuple[int, ...], eps: float, has_mean: bool = True, mask: Tensor | None = None
) -> Statistics:
    """Statistics of the input over `axes`, along which there are values."""
    values = operand_of(input, None, axes)
    if values is None:
        return closed_forms.own_statistics(input, axes=axes, eps=eps, has_mean=has_mean, mask=mask)
    if mask is None:
        rows, count = _standardize.measure(values, eps=eps, has_mean=has_mean)
        return Statistics(Measured(rows, values.plan), eps, axes, count, None, has_mean)
    counted = torch.empty_like(values.tensor, dtype=torch.bool).copy_(mask.expand(input.shape))
    rows, counts = _standardize.measure(values, eps=eps, has_mean=has_mean, mask=counted)
    count = values.box.restore_statistics(torch.from_numpy(counts))
    return Statistics(Measured(rows, values.plan), eps, axes, count, mask, has_mean)


def standardize_own(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    axes: tuple[int, ...],
    eps: float,
    has_mean: bool = True,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    seen: Seen = AS_GIVEN,
) -> Standardized:
    """The output, in `out` where that is given, and the statistics of what is seen, over its `axes`."""
    values = None
    if mask is None:
        values = operand_of(input, seen.view, axes, seen.front(weight), seen.front(bias))
    if values is None:
        by = own_statistics(seen.values(input), axes=axes, eps=eps, has_mean=has_mean, mask=mask)
        return Standardized(_standardized(input, by, weight, bias, out, seen), by)
    output = _target(values, out)
    rows, count, is_done = _standardize.standardize_own(values, output, weight, bias, eps=eps, has_mean=has_mean)
    by = Statistics(Measured(rows, values.plan, is_done), eps, axes, count, None, has_mean)
    return Standardized(output if is_done else _plainly(input, by, weight, bias, out, seen), by)


def standardize_given(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    mean: Tensor,
    var: Tensor,
    eps: float,
    out: Tensor | None = None,
    seen: Seen = AS_GIVEN,
) -> Standardized:
    """The same by given statistics, constants that broadcast against what is seen."""
    kept = seen.kept or mean.shape
    axes = _shared_axes(input.ndim if seen.view is None else len(seen.view), kept)
    values = operand_of(input, seen.view, axes, seen.front(weight), seen.front(bias))
    # Ahead of small tensors, which would split the memory that the last output of its size has left.
    output = None if values is None else _target(values, out)
    rows = None if values is None else _standardize.given(values, mean, var, eps=eps)
    if values is None or output is None or rows is None:
        by = closed_forms.given_statistics(mean.reshape(kept), var.reshape(kept), eps=eps)
        return Standardized(_standardized(input, by, weight, bias, out, seen), by)
    is_done = _standardize.standardize(values, output, weight, bias, rows)
    by = Statistics(Measured(rows, values.plan, is_done), eps)
    return Standardized(output if is_done else _plainly(input, by, weight, bias, out, seen), by)


def standardize(
    input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """A new tensor, or `out`, of the input's shape, datatype and memory format, cast once."""
    return _standardized(input, by, weight, bias, out, AS_GIVEN)


def _target(values: Operand, out: Tensor | None) -> Tensor:
    return torch.empty_like(values.tensor) if out is None else out


def _filled(out: Tensor | None, output: Tensor) -> Tensor:
    return output if out is None else out.copy_(output)


def _standardized(
    input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None, out: Tensor | None, seen: Seen
) -> Tensor:
    values = operand_of(input, seen.view, axes_of(input, by, seen.view), seen.front(weight), seen.front(bias))
    if values is None and seen.view is not None:
        # There may be a box of the view where strides allow no such view of the input.
        output = standardize(seen.values(input), by, seen.parameter(weight), seen.parameter(bias))
        return _filled(out, output.reshape(input.shape))
    if values is not None:
        output = _target(values, out)
        if _standardize.standardize(values, output, weight, bias, by.rows(values.box)):
            return output
    return _plainly(input, by, weight, bias, out, seen)


def _plainly(
    input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None, out: Tensor | None, seen: Seen
) -> Tensor:
    output = closed_forms.standardize(seen.values(input), by, seen.parameter(weight), seen.parameter(bias))
    return _filled(out, output.reshape(input.shape))


def axes_of(input: Tensor, by: Statistics, view: tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes of what is seen along which values share their statistics."""
    if by.axes:
        return by.axes
    if isinstance(by.found, Measured):
        return by.found.box.shared
    return _shared_axes(input.ndim if view is None else len(view), by.table.shape[1:])


@lru_cache(1024)
def _shared_axes(rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same for statistics of a shape that broadcasts against an input of this rank."""
    missing = rank - len(shape)
    return tuple(axis for axis in range(rank) if axis < missing or shape[axis - missing] == 1)
