"""A tensor seen as (outer, channels, inner), so that one kernel serves every rank, channel axis and memory format."""

from dataclasses import dataclass

import torch
from torch import Tensor

# A block of this many elements and its scratch copy stay in a core's second-level cache. Smaller blocks cost more in
# calls than they gain; measured with (32, 64, 56, 56) and (32, 256, 14, 14) in both memory formats.
_BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True, slots=True)
class Slab:
    """A dense view (outer, channels, inner) of a tensor, and the way back to the tensor's own shape and strides."""

    values: Tensor
    shape: torch.Size
    channel_axis: int
    has_channels_innermost: bool

    @classmethod
    def of(cls, tensor: Tensor, *, channel_axis: int) -> "Slab":
        """View `tensor`, or a contiguous copy where its strides allow no such view; `channel_axis` from the front."""
        moved = tensor.movedim(channel_axis, -1)
        if moved.is_contiguous() and not tensor.is_contiguous():
            values = moved.reshape(-1, moved.shape[-1], 1)
            return cls(values, moved.shape, channel_axis, has_channels_innermost=True)
        outer, inner = tensor.shape[:channel_axis].numel(), tensor.shape[channel_axis + 1 :].numel()
        values = tensor.contiguous().view(outer, tensor.shape[channel_axis], inner)
        return cls(values, tensor.shape, channel_axis, has_channels_innermost=False)

    @property
    def count(self) -> int:
        """Elements per channel."""
        return self.values.shape[0] * self.values.shape[2]

    def restore(self, values: Tensor) -> Tensor:
        """Values of the slab's shape as a tensor of the original shape and memory format."""
        restored = values.view(self.shape)
        return restored.movedim(-1, self.channel_axis) if self.has_channels_innermost else restored


def blocks(values: Tensor) -> tuple[Tensor, ...]:
    """Views that cover a slab's values and each fit in the cache; one view where there is no such cache to fit."""
    _, channels, inner = values.shape
    if values.device.type != "cpu" or values.numel() <= _BLOCK_ELEMENTS:
        return (values,)
    if channels * inner <= _BLOCK_ELEMENTS:
        return torch.split(values, max(1, _BLOCK_ELEMENTS // (channels * inner)))
    width = max(1, _BLOCK_ELEMENTS // channels)
    return tuple(block for sample in torch.split(values, 1) for block in torch.split(sample, width, dim=2))
