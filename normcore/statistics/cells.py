"""The cells that a histogram counts in: intervals that follow from the smallest and the largest value alone.

The bits of a floating number, read as an integer, ascend with its magnitude, and 2^m consecutive ones share an octave's
2^-m part: cells of equally many such integers are logarithmic over octaves and linear within a narrow range. Cells are
aligned to powers of two and only ever grow with the range, so that those of a part lie within those of the whole:
counts of parts add up to the counts of the whole exactly, in any order.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

CELLS = 1024
# An octave of magnitudes has 2^32 keys: float64's exponent and the first 32 bits of its mantissa.
_OCTAVE_BITS = 32
_DROPPED_BITS = 20
_INFINITY = 2047 << _OCTAVE_BITS
# Magnitudes so many octaves below the largest share the cell of 0.
_OCTAVES = 24
# With values on both sides of 0, 16 cells an octave: two sides of up to 25 octaves fit.
_BOTH_SIDES_SHIFT = _OCTAVE_BITS - 4


@dataclass(frozen=True, slots=True)
class Cells:
    """A row of cells per channel; int64 of shape (rows,) but for the first two, float64.

    Attributes:
        smallest: value; infinity where there is none.
        largest: value; -infinity where there is none.
        floor: the key of the least magnitude that is told from 0.
        shift: a cell has 2^shift keys.
        first: the index of the first cell: the smallest value's key, shifted.
    """

    smallest: Tensor
    largest: Tensor
    floor: Tensor
    shift: Tensor
    first: Tensor

    @classmethod
    def covering(cls, smallest: Tensor, largest: Tensor) -> "Cells":
        """The cells of the values from `smallest` to `largest`, for each row."""
        is_empty = smallest > largest
        low, high = smallest.masked_fill(is_empty, 0.0), largest.masked_fill(is_empty, 0.0)
        octave = _magnitude_keys(torch.maximum(low.abs(), high.abs())) >> _OCTAVE_BITS
        floor = (octave - _OCTAVES).clamp_min(0) << _OCTAVE_BITS
        low_key, high_key = _keys(low, floor), _keys(high, floor)
        shift = torch.zeros_like(floor)
        for _ in range(_BOTH_SIDES_SHIFT):
            shift += (high_key >> shift) - (low_key >> shift) >= CELLS
        shift = shift.masked_fill((low < 0) & (high >= 0), _BOTH_SIDES_SHIFT)
        return cls(smallest, largest, floor, shift, low_key >> shift)

    def rows(self, index: Tensor) -> "Cells":
        """Those of some rows."""
        return Cells(*(getattr(self, field.name)[index] for field in fields(self)))

    def differ_from(self, other: "Cells") -> Tensor:
        """Whether the cells of a row are not those of the other; bool (rows,)."""
        return (self.floor != other.floor) | (self.shift != other.shift) | (self.first != other.first)

    def index(self, values: Tensor) -> Tensor:
        """The cell in its row of each of (outer, rows, inner) finite float64 within the range; elsewhere of no use."""
        floor, shift, first = (per_row[:, None] for per_row in (self.floor, self.shift, self.first))
        return (_keys(values, floor) >> shift).sub_(first).clamp_(0, CELLS - 1)

    def index_of(self, parts: "Cells") -> Tensor:
        """The cell here that each cell of `parts`, whose range is within this one's, lies in; (rows, CELLS)."""
        cell = parts.first[:, None] + torch.arange(CELLS, device=parts.first.device)
        sign = cell >> 63
        magnitude = ((cell ^ sign) << parts.shift[:, None]) + (parts.floor - self.floor)[:, None]
        key = magnitude.clamp_min(0) ^ sign
        return ((key >> self.shift[:, None]) - self.first[:, None]).clamp(0, CELLS - 1)

    def edges(self) -> Tensor:
        """Where cells begin and end, cut to the range of the values; float64 of shape (rows, CELLS + 1)."""
        key = (self.first[:, None] + torch.arange(CELLS + 1, device=self.first.device)) << self.shift[:, None]
        magnitude = (key.abs() + self.floor[:, None]).clamp_max(_INFINITY)
        value = (magnitude << _DROPPED_BITS).view(torch.float64).masked_fill(key == 0, 0.0)
        signed = torch.where(key < 0, -value, value)
        return torch.maximum(torch.minimum(signed, self.largest[:, None]), self.smallest[:, None])


def _magnitude_keys(values: Tensor) -> Tensor:
    return values.abs().view(torch.int64) >> _DROPPED_BITS


def _keys(values: Tensor, floor: Tensor) -> Tensor:
    # k for values >= 0 and -1 - k below, which is the complement of k; a negative zero is a zero.
    key = values.abs().view(torch.int64).bitwise_right_shift_(_DROPPED_BITS).sub_(floor).clamp_min_(0)
    return torch.where(values < 0, ~key, key)
