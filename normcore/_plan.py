"""What follows from the shape, strides and datatype of a tensor for the compiled kernels, kept from call to call.

What leads to a kernel costs as much as the kernel itself on some thousand values, and more once those have driven it
out of the cache: a call looks its plan up, and does the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normcore._box import Box, box_of

# A number of the datatype that kernels see the values in, which tells them.
KINDS: dict[torch.dtype, Any] = {
    torch.float16: np.int16(0),
    torch.bfloat16: np.uint16(0),
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
}
# Fewer columns than this are repeated up to so many bytes of values, for loops that are worth their start.
_FEW_COLUMNS, _NARROW_BYTES = 64, 256
# Elements summed as one part.
_PART = 2**16
# Elements that stay in a core's cache from one sweep to the next.
_CACHED = 2**18
# Parameters that are kept where there are none.
_SMALL = 2**12
# Places of fewer bytes than this, apart from each other, are slower to read twice in turn than all of memory in order.
_RUN_BYTES = 2**14
# Of a backward: groups side by side of so many bytes together, or one of twice as many, and their least run.
_BLOCK_BYTES, _BLOCK_RUN_BYTES = 2**17, 2**11


class Operand(NamedTuple):
    """A dense tensor and its plan."""

    tensor: Tensor
    plan: "Plan"

    @property
    def box(self) -> Box:
        return self.plan.box

    def parameter(self, tensor: Tensor | None, value: float) -> Tensor:
        """Weight or bias as (Q * G * K,), in the datatype computed in; the value where there is none."""
        box, dtype = self.plan.box, self.plan.parameter_dtype
        if tensor is None:
            make = _constant if box.parameters_count <= _SMALL else _constant.__wrapped__
            return make(value, box.parameters_count, dtype)
        if not (box.is_affine_in_order and tensor.numel() == box.parameters_count):
            tensor = tensor.detach()
            is_front = tensor.numel() == math.prod(self.plan.front)
            tensor = box.parameters(tensor.reshape(self.plan.front) if is_front else tensor)
        if tensor.dtype is not dtype:
            tensor = (tensor.detach() if tensor.requires_grad else tensor).to(dtype)
        return as_stored(tensor)

    def divide(self, kernel: Any, units: int, tensors: Sequence[Tensor | None], *arguments: Any) -> None:
        """Call a kernel of the values' kind, the addresses of tensors (0 for none), others, and units of work."""
        # The caller has the tensors meanwhile, and their memory stays.
        places = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        compiled().divide(kernel, units, self.tensor.numel(), self.plan.kind, *places, *arguments)


@dataclass(frozen=True)
class Plan:
    """What follows from the shape, strides and datatype of a tensor; kept from call to call.

    Attributes:
        box: how its values are seen.
        parameter_dtype: of weight and bias: what outputs are computed in.
        kind: what tells kernels the datatype.
        front: shape in which parameters broadcast against what is seen; of those that have one, the first.
        made_for: what it follows from: datatype, shape, strides, view, and the shapes of parameters.
    """

    box: Box
    parameter_dtype: torch.dtype
    kind: Any
    front: tuple[int, ...]
    made_for: tuple[Any, ...]

    def serves(self, input: Tensor, view: tuple[int, ...] | None, fronts: tuple[tuple[int, ...] | None, ...]) -> bool:
        """Whether it is the plan for a tensor and parameters, for the axes that it was made for."""
        dtype, shape, strides, own_view, own_fronts = self.made_for
        is_same = own_view == view and own_fronts == fronts and dtype is input.dtype
        return is_same and strides == input.stride() and shape == input.shape and not input.is_neg()

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return int(self.kind.itemsize)

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
    def block(self) -> int:
        """Groups that a backward reads twice together, while they stay in the cache; 0 where all are read in order."""
        box = self.box
        if self.is_cached or box.has_columns or self.itemsize == 2:
            # Half precision takes longer to compute than to read.
            return int(self.is_cached)
        size = box.count * self.itemsize
        block = max(1, _BLOCK_BYTES // size)
        is_long = block * box.sizes[3] * box.sizes[4] * self.itemsize >= _BLOCK_RUN_BYTES
        return block if is_long and size <= 2 * _BLOCK_BYTES else 0

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
        rows = max(1, _PART // self.width)
        size = (min(rows, column_sweeps().FEW_ROWS) if self.plan.itemsize == 8 else rows) * self.width
        return -(-elements // size), size, elements

    def terms(self, count: int) -> Any:
        """Room for terms (count, segments, W), the columns repeated."""
        return np.empty((count, self.count, self.width), self.plan.dtype)

    def room_for_sums(self) -> Any:
        """Room for two sums (parts of all, 2, W)."""
        return np.empty((self.count * self.parts[0], 2, self.width))

    def sums(self, values: Operand, center: Any, *grad: Tensor) -> Any:
        """Two sums (parts of all, 2, W) around centers (segments, W), made in their datatype."""
        found = self.room_for_sums()
        arguments = (*(None,) * (2 - len(grad)), center, found, self.parts)
        values.divide(column_sweeps().sum_columns, len(found), (values.tensor, *grad), *arguments)
        return found

    def apply(self, kernel: Any, values: Operand, others: Sequence[Tensor], terms: Any) -> None:
        """Call a kernel of the values, tensors like them, and terms."""
        parts = self.parts
        values.divide(kernel, self.count * parts[0], (values.tensor, *others), terms, parts)


def operand_of(
    input: Tensor,
    view: tuple[int, ...] | None,
    reduced: tuple[int, ...],
    *fronts: tuple[int, ...] | None,
) -> Operand | None:
    """The input for the compiled kernels, as a dense copy where it has gaps; None where they do not serve.

    Statistics are over the `reduced` axes of the view, and parameters of the shapes that follow in front of it.
    """
    if not input.is_cpu or not input.numel():
        return None
    input = input.detach().resolve_neg() if input.is_neg() else input
    how = view, reduced, *fronts
    plan = _cached(input.dtype, input.shape, input.stride(), *how)
    if plan is None:
        dense = torch.empty_like(input)
        strides = dense.stride()
        plan = None if strides == input.stride() else _cached(input.dtype, input.shape, strides, *how)
        if plan is None:
            return None
        input = dense.copy_(input.detach())
    return Operand(input, plan)


def as_stored(tensor: Tensor) -> Tensor:
    """The values in order, as they stand in memory: not as a view that shows them negated."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().contiguous()


@lru_cache(1024)
def _cached(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    view: tuple[int, ...] | None,
    reduced: tuple[int, ...],
    *parameters: tuple[int, ...] | None,
) -> Plan | None:
    made_for = dtype, shape, strides, view, parameters
    if view is not None and view != shape:
        try:
            strides = torch.empty_strided(shape, strides, device="meta").view(view).stride()
        except RuntimeError:  # no such view
            return None
        shape = view
    box = box_of(shape, strides, reduced, *parameters)
    front = next((own for own in parameters if own is not None), ())
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return None if box is None else Plan(box, wide, KINDS[dtype], front, made_for)


@lru_cache(64)
def _constant(value: float, count: int, dtype: torch.dtype) -> Tensor:
    return torch.full((count,), value, dtype=dtype)


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
