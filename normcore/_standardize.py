"""The compiled kernels on tensors of the CPU that are not empty: statistics, standardize and its backward.

Every sum is made in blocks that depend on shapes alone and joined in one order: results do not depend on the number of
threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normcore._box import Box, box_of

# Few columns are repeated up to so many bytes of values, for loops that are worth their start. Rows that are worked on
# together lie side by side then, or in pages of their own: what is read in turn within a page is not fetched ahead.
_NARROW_BYTES, _WIDE_BYTES = 256, 4096
# Elements summed as one part.
_PART = 2**16
# Elements that stay in a core's cache from one sweep to the next.
_CACHED = 2**18
# Places of fewer bytes than this, apart from each other, are slower to read twice in turn than all of memory in order.
_RUN_BYTES = 2**14


@dataclass(frozen=True, slots=True)
class Operand:
    """A dense tensor, its flat array and its box."""

    tensor: Tensor
    array: Any
    box: Box

    @classmethod
    def of(cls, tensor: Tensor, box: Box) -> "Operand":
        return cls(tensor, compiled().flat(tensor), box)

    @property
    def dtype(self) -> Any:
        """What outputs are computed in."""
        return np.float64 if self.array.itemsize == 8 else np.float32

    @property
    def sum_dtype(self) -> Any:
        """What sums are made of."""
        return np.float32 if self.array.itemsize == 2 else np.float64

    @property
    def count(self) -> int:
        """Values of a group."""
        return self.box.count

    @property
    def has_columns(self) -> bool:
        return self.box.has_columns

    @property
    def is_cached(self) -> bool:
        """Whether a group, or all of a sample of columns, stays in the cache from one sweep to the next."""
        box = self.box
        _, rows, groups, channels, positions = box.sizes
        if not box.has_columns:
            run = channels * positions * self.array.itemsize
            return box.count <= _CACHED and (rows == 1 or run >= _RUN_BYTES)
        return box.count * groups <= _CACHED and box.per >= rows

    @property
    def has_vectors(self) -> bool:
        """Whether a group has one position per channel, all side by side."""
        return self.box.sizes[4] == 1 and not self.has_columns

    def parameter(self, tensor: Tensor | None, value: float) -> Any:
        """Weight or bias as (Q * G * K,), in the datatype computed in; the value where there is none."""
        if tensor is None:
            return np.full(self.box.parameters_count, value, self.dtype)
        dtype, own = torch.float64 if self.array.itemsize == 8 else torch.float32, self.box.parameters(tensor)
        return compiled().flat((own if own.dtype == dtype else own.to(dtype)).contiguous())

    def divide(self, kernel: Any, units: int, *arguments: Any) -> None:
        compiled().divide(kernel, units, self.array.size, *arguments)


def operand_of(input: Tensor, reduced: Sequence[int], *parameters: Tensor | tuple[int, ...] | None) -> Operand | None:
    """The input for the compiled kernels, as a dense copy where it has gaps; None where they do not serve."""
    if not input.is_cpu or not input.numel():
        return None
    box = box_of(input, reduced, *parameters)
    if box is not None:
        return Operand.of(input, box)
    dense = torch.empty_like(input)
    box = None if dense.stride() == input.stride() else box_of(dense, reduced, *parameters)
    return None if box is None else Operand.of(dense.copy_(input.detach()), box)


def given(values: Operand, mean: Tensor, var: Tensor, *, eps: float) -> Any:
    """Statistics (5, B * G) of a given mean and variance; None where they are not one of each group, in order."""
    box = values.box
    if not box.is_kept_in_order or not mean.numel() == var.numel() == box.groups:
        return None
    rows = np.empty((5, box.groups))
    sweeps().fill_given(*(compiled().flat(term.contiguous()) for term in (mean, var)), rows, eps)
    return rows


def measure(values: Operand, *, eps: float, has_mean: bool = True, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Statistics (5, B * G) as `_sweeps` has them, and the count behind each."""
    samples, _, groups, _, _ = values.box.sizes
    by = np.empty((5, samples * groups))
    if mask is not None:
        return by, _measure_counted(values, by, compiled().flat(mask), eps=eps, has_mean=has_mean)
    if values.has_columns:
        _measure_columns(values, by, eps=eps, has_mean=has_mean)
    else:
        nothing = np.empty(0, values.dtype)
        _measure_groups(values, values.array[:0], nothing, nothing, by, eps=eps, has_mean=has_mean)
    return by, values.count


def standardize_own(
    values: Operand, out: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, has_mean: bool
) -> tuple[Any, int, bool]:
    """Statistics as `measure` gives them, and the output by them, as `standardize` gives it."""
    if not values.is_cached:
        by, count = measure(values, eps=eps, has_mean=has_mean)
        return by, count, standardize(values, out, weight, bias, by)
    samples, _, groups, _, _ = values.box.sizes
    by = np.empty((5, samples * groups))
    affine = values.parameter(weight, 1.0), values.parameter(bias, 0.0)
    if values.has_columns:
        steps = values.box.per, Columns.of(values).width
        arguments = values.array, compiled().flat(out), *affine, by, values.box.sizes, steps, eps, has_mean
        values.divide(column_sweeps().standardize_samples, samples, *arguments)
    else:
        _measure_groups(values, compiled().flat(out), *affine, by, eps=eps, has_mean=has_mean)
    return by, values.count, is_usual(values, by)


def standardize(values: Operand, out: Tensor, weight: Tensor | None, bias: Tensor | None, by: Any) -> bool:
    """The output by statistics (5, B * G); false, and none, where the datatype computed in does not hold the terms."""
    scale, shift, target = values.parameter(weight, 1.0), values.parameter(bias, 0.0), compiled().flat(out)
    rows, sizes, per = values.box.rows, values.box.sizes, values.box.per
    if values.has_vectors:
        if not is_usual(values, by):
            return False
        values.divide(sweeps().standardize_vectors, rows, values.array, target, scale, shift, by, sizes, per)
        return True
    columns = Columns.of(values)
    terms = columns.terms(3)
    if not sweeps().fill_terms(scale, shift, by, terms, sizes, columns.segment, per):
        return False
    if values.has_columns:
        columns.apply(column_sweeps().standardize_columns, target, terms)
    else:
        values.divide(sweeps().standardize_cells, rows, values.array, target, terms, columns.segment, sizes[4])
    return True


def is_usual(values: Operand, by: Any) -> bool:
    """Whether float32 holds what is computed in it with these statistics."""
    if values.dtype == np.float64:
        return True
    return bool(sweeps().are_usual(by))


def _measure_groups(values: Operand, out: Any, weight: Any, bias: Any, by: Any, *, eps: float, has_mean: bool) -> None:
    samples, _, groups, _, _ = values.box.sizes
    arguments = values.array, out, weight, bias, by, values.box.sizes, values.box.per, eps, has_mean
    values.divide(sweeps().standardize_groups, samples * groups, *arguments)


def _measure_columns(values: Operand, by: Any, *, eps: float, has_mean: bool) -> None:
    samples, rows, _, _, _ = values.box.sizes
    columns = Columns.of(values, segment=rows)
    center = np.zeros((samples, columns.width), values.sum_dtype)
    if has_mean:
        column_sweeps().find_centers(values.array, center, values.box.width, rows)
    sums = columns.sums(center)
    if has_mean and column_sweeps().correct_centers(values.array, center, sums, rows):
        sums = columns.sums(center)
    if not column_sweeps().has_digits(values.array, sums[1], rows):
        sums = columns.sums(center.astype(np.float64))
    column_sweeps().settle_columns(values.array, by, center, sums, values.box.sizes, eps, has_mean)


def _measure_counted(values: Operand, by: Any, mask: Any, *, eps: float, has_mean: bool) -> Any:
    samples = values.box.sizes[0]
    center = np.full(by.shape[1], np.nan if has_mean else 0.0)
    sums = np.empty((3, by.shape[1]))
    for is_last in (False, True):
        sums[:] = 0.0
        values.divide(sweeps().sum_counted, samples, values.array, mask, center, sums, values.box.sizes)
        if is_last or not has_mean or values.array.itemsize < 8:
            break
        center = center + sums[1] / sums[0]
    sweeps().settle_counted(values.array, by, center, sums, eps, has_mean)
    return sums[0]


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows of columns, one position per channel: a row of parameters for every segment of rows.

    Attributes:
        segment: rows that share statistics, weight and bias.
        repeats: rows that are seen as one, to make it wide.
    """

    values: Operand
    segment: int
    repeats: int

    @classmethod
    def of(cls, values: Operand, *, segment: int | None = None) -> "Columns":
        segment = min(values.box.per, values.box.sizes[1]) if segment is None else segment
        if not values.has_columns:
            return cls(values, segment, 1)
        size = values.array.itemsize * values.box.width
        repeats = (_NARROW_BYTES if size <= _NARROW_BYTES else _WIDE_BYTES) // size
        return cls(values, segment, max(1, min(repeats, segment)))

    @property
    def width(self) -> int:
        return self.repeats * self.values.box.width

    @property
    def count(self) -> int:
        return self.values.box.rows // self.segment

    @property
    def parts(self) -> tuple[int, int, int]:
        """Parts of a segment, elements of a part, and elements of a segment."""
        elements = self.segment * self.values.box.width
        size = max(1, _PART // self.width) * self.width
        return -(-elements // size), size, elements

    def terms(self, count: int) -> Any:
        """Room for terms (count, segments, W), the columns repeated."""
        return np.empty((count, self.count, self.width), self.values.dtype)

    def sums(self, center: Any, grad: Any = None, out: Any = None, terms: Any = None) -> Any:
        """Two sums (2, segments, columns) around centers (segments, W), made in their datatype.

        With `out`, what `standardize` by the terms makes of the gradient goes there.
        """
        parts = self.parts
        found = np.empty((self.count * parts[0], 2, self.width))
        arguments = self.values.array, grad, out, terms, center, found, parts
        self.values.divide(column_sweeps().sum_columns, len(found), *arguments)
        joined = np.empty((2, self.count, self.values.box.width))
        column_sweeps().join_sums(found, joined, parts[0])
        return joined

    def apply(self, kernel: Any, *arrays: Any) -> None:
        """Call a kernel of the values, arrays like them, and terms."""
        parts = self.parts
        self.values.divide(kernel, self.count * parts[0], self.values.array, *arrays, parts)


@cache
def compiled() -> ModuleType:
    from normcore import _compiled

    return _compiled


@cache
def sweeps() -> ModuleType:
    from normcore import _sweeps

    return _sweeps


@cache
def column_sweeps() -> ModuleType:
    from normcore import _column_sweeps

    return _column_sweeps
