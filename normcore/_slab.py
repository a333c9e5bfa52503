"""A tensor seen as (outer, channels, inner), so that one kernel serves every rank, channel axis and memory format."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

# A block of this many elements and its scratch copy stay in a core's second-level cache. Smaller blocks cost more in
# calls than they gain; measured with (32, 64, 56, 56) and (32, 256, 14, 14) in both memory formats.
_BLOCK_ELEMENTS = 2**18
# A sample of up to so many blocks stays one, in the last cache: divided, it would not be contiguous, for which torch's
# fused operations take copies.
_LARGEST_SAMPLE = 8


@dataclass(frozen=True, slots=True)
class Slab:
    """A dense view (outer, channels, inner) of a tensor, and the way back to the tensor's own shape and strides.

    Attributes:
        shape: the tensor's.
        order: its axes in the order of the slab.
        kept: those of its axes that make the channels, ascending.
    """

    values: Tensor
    shape: torch.Size
    order: tuple[int, ...]
    kept: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, *, channel_axis: int) -> "Slab":
        """View `tensor`, or a contiguous copy where its strides allow no such view; `channel_axis` from the front."""
        return cls.keeping(tensor, (channel_axis,))

    @classmethod
    def keeping(cls, tensor: Tensor, axes: tuple[int, ...]) -> "Slab":
        """The same with all of `axes`, ascending and from the front, as channels."""
        order = tuple(range(tensor.ndim))
        if not tensor.is_contiguous() and tensor.permute(_with_last(axes, tensor.ndim)).is_contiguous():
            order = _with_last(axes, tensor.ndim)
        elif not is_adjacent(tensor.shape, axes):
            order = (*axes, *_others(axes, tensor.ndim))
        first, last = (order.index(axes[0]), order.index(axes[-1])) if axes else (0, -1)
        moved = tensor.permute(order).contiguous()
        sizes = (moved.shape[:first], moved.shape[first : last + 1], moved.shape[last + 1 :])
        return cls(moved.view([size.numel() for size in sizes]), tensor.shape, order, axes)

    @property
    def count(self) -> int:
        """Elements per channel."""
        return self.values.shape[0] * self.values.shape[2]

    def seen_alike(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape as this one's, in the same view; a copy where its strides allow none."""
        return tensor.permute(self.order).contiguous().view(self.values.shape)

    def restore(self, values: Tensor) -> Tensor:
        """Values of the slab's shape as a tensor of the original shape and memory format."""
        moved = values.view([self.shape[axis] for axis in self.order])
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return moved.permute(inverse)

    def per_channel(self, tensor: Tensor) -> Tensor:
        """A tensor that broadcasts against the original, with size 1 along all axes but those kept, as (channels,)."""
        sizes = [size if axis in self.kept else 1 for axis, size in enumerate(self.shape)]
        return tensor.expand(sizes).reshape(-1)


def is_adjacent(shape: torch.Size, axes: Collection[int]) -> bool:
    """Whether no axis of a size above 1 lies between `axes`."""
    return not any(shape[axis] > 1 and axis not in axes for axis in range(min(axes, default=0), max(axes, default=0)))


def blocks(values: Tensor) -> tuple[Tensor, ...]:
    """Views that cover a slab's values and each fit in a cache; one view where there is no such cache to fit."""
    _, channels, inner = values.shape
    if values.device.type != "cpu" or values.numel() <= _BLOCK_ELEMENTS:
        return (values,)
    if channels * inner <= _LARGEST_SAMPLE * _BLOCK_ELEMENTS:
        return torch.split(values, max(1, _BLOCK_ELEMENTS // (channels * inner)))
    width = max(1, _BLOCK_ELEMENTS // channels)
    return tuple(block for sample in torch.split(values, 1) for block in torch.split(sample, width, dim=2))


def _with_last(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (*_others(axes, rank), *axes)


def _others(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in axes)
