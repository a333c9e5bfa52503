"""What follows from the shape, strides and datatype of a tensor for the compiled kernels, kept from call to call.

What leads to a kernel costs as much as the kernel itself on some thousand values, and more once those have driven it
out of the cache: a call looks its plan up, and does the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normcore._box import Box, box_of

# Fewer columns than this are repeated up to so many bytes of values, for loops that are worth their start.
_FEW_COLUMNS, _NARROW_BYTES = 64, 256
# Elements summed as one part.
_PART = 2**16
# Elements that stay in a core's cache from one sweep to the next.
_CACHED = 2**18
# Places of fewer bytes than this, apart from each other, are slower to read twice in turn than all of memory in order.
_RUN_BYTES = 2**14


class Operand(NamedTuple):
    """A dense tensor, its flat array and its plan."""

    tensor: Tensor
    array: Any
    plan: "Plan"

    @property
    def box(self) -> Box:
        return self.plan.box

    def parameter(self, tensor: Tensor | None, value: float) -> Any:
        """Weight or bias as (Q * G * K,), in the datatype computed in; the value where there is none."""
        box, dtype = self.plan.box, self.plan.parameter_dtype
        if tensor is None:
            return np.full(box.parameters_count, value, self.plan.dtype)
        is_ready = tensor.dtype is dtype and box.is_affine_in_order and tensor.is_contiguous()
        if not is_ready or tensor.numel() != box.parameters_count:
            tensor = box.parameters(tensor).to(dtype).contiguous()
        return compiled().flat(tensor)

    def divide(self, kernel: Any, units: int, *arguments: Any) -> None:
        compiled().divide(kernel, units, self.array.size, *arguments)


@dataclass(frozen=True)
class Plan:
    """What follows from the shape, strides and datatype of a tensor; kept from call to call.

    Attributes:
        box: how its values are seen.
        parameter_dtype: of weight and bias: what outputs are computed in.
        itemsize: bytes of a value.
    """

    box: Box
    parameter_dtype: torch.dtype
    itemsize: int

    @cached_property
    def dtype(self) -> Any:
        """What outputs are computed in."""
        return np.float64 if self.itemsize == 8 else np.float32

    @cached_property
    def sum_dtype(self) -> Any:
        """What sums are made of."""
        return np.float32 if self.itemsize == 2 else np.float64

    @cached_property
    def is_cached(self) -> bool:
        """Whether a group, or all of a sample of columns, stays in the cache from one sweep to the next."""
        box = self.box
        _, rows, groups, channels, positions = box.sizes
        if not box.has_columns:
            run = channels * positions * self.itemsize
            return box.count <= _CACHED and (rows == 1 or run >= _RUN_BYTES)
        return box.count * groups <= _CACHED and box.per >= rows

    @cached_property
    def columns(self) -> "Columns":
        """Rows that share statistics, weight and bias."""
        return self.columns_of(min(self.box.per, self.box.sizes[1]))

    @cached_property
    def group_columns(self) -> "Columns":
        """Rows that share statistics."""
        return self.columns_of(self.box.sizes[1])

    def columns_of(self, segment: int) -> "Columns":
        if not self.box.has_columns:
            return Columns(self, segment, 1)
        width = self.box.width
        repeats = 1 if width >= _FEW_COLUMNS else _NARROW_BYTES // (self.itemsize * width)
        return Columns(self, segment, max(1, min(repeats, segment)))


@dataclass(frozen=True)
class Columns:
    """Rows of columns, one position per channel: a row of parameters for every segment of rows.

    Attributes:
        segment: rows that share statistics, weight and bias.
        repeats: rows that are seen as one, to make it wide.
    """

    plan: Plan
    segment: int
    repeats: int

    @cached_property
    def width(self) -> int:
        return self.repeats * self.plan.box.width

    @cached_property
    def count(self) -> int:
        """Segments."""
        return self.plan.box.rows // self.segment

    @cached_property
    def parts(self) -> tuple[int, int, int]:
        """Parts of a segment, elements of a part, and elements of a segment."""
        elements = self.segment * self.plan.box.width
        size = max(1, _PART // self.width) * self.width
        return -(-elements // size), size, elements

    def terms(self, count: int) -> Any:
        """Room for terms (count, segments, W), the columns repeated."""
        return np.empty((count, self.count, self.width), self.plan.dtype)

    def sums(self, values: Operand, center: Any, grad: Any = None, out: Any = None, terms: Any = None) -> Any:
        """Two sums (2, segments, columns) around centers (segments, W), made in their datatype.

        With `out`, what `standardize` by the terms makes of the gradient goes there.
        """
        parts = self.parts
        found = np.empty((self.count * parts[0], 2, self.width))
        arguments = values.array, grad, out, terms, center, found, parts
        values.divide(column_sweeps().sum_columns, len(found), *arguments)
        joined = np.empty((2, self.count, self.plan.box.width))
        column_sweeps().join_sums(found, joined, parts[0])
        return joined

    def apply(self, kernel: Any, values: Operand, *arrays: Any) -> None:
        """Call a kernel of the values, arrays like them, and terms."""
        parts = self.parts
        values.divide(kernel, self.count * parts[0], values.array, *arrays, parts)


def operand_of(input: Tensor, reduced: Sequence[int], *parameters: Tensor | tuple[int, ...] | None) -> Operand | None:
    """The input for the compiled kernels, as a dense copy where it has gaps; None where they do not serve."""
    if not input.is_cpu or not input.numel():
        return None
    plan = _plan_of(input, reduced, *parameters)
    if plan is None:
        dense = torch.empty_like(input)
        plan = None if dense.stride() == input.stride() else _plan_of(dense, reduced, *parameters)
        if plan is None:
            return None
        input = dense.copy_(input.detach())
    return Operand(input, compiled().flat(input), plan)


def _plan_of(input: Tensor, reduced: Sequence[int], *parameters: Tensor | tuple[int, ...] | None) -> Plan | None:
    shapes = [term if term is None or isinstance(term, tuple) else term.shape for term in parameters]
    return _cached(input.dtype, input.shape, input.stride(), tuple(reduced), *shapes)


@lru_cache(1024)
def _cached(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    reduced: tuple[int, ...],
    *parameters: tuple[int, ...] | None,
) -> Plan | None:
    box = box_of(shape, strides, reduced, *parameters)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return None if box is None else Plan(box, wide, dtype.itemsize)


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
