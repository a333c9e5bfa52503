"""Blocks of a tensor in memory order, whose moments are summed while they are in a cache and merged one by one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from normcore.statistics.values import exact_values

# Elements of a block, which stays in a core's second-level cache while it is summed.
_ELEMENTS = 2**16
# Channels shorter than this are taken over several samples at once: a merge costs more than so few values do.
_SHORT_CHANNEL = 256
_SAMPLES = 64
# Bound on the samples of many short channels that are one block.
_LARGEST = 2**22


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous part of a tensor: (outer, channels, inner) from `first_channel` on."""

    shape: tuple[int, int, int]
    first_channel: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def blocks_of(outer: int, channels: int, inner: int) -> Iterator[Block]:
    """The blocks of a tensor (outer, channels, inner), in the order of its memory; none where it is empty."""
    if outer * channels * inner == 0:
        return
    samples = _samples(channels, inner)
    for sample in range(0, outer, max(1, samples)):
        if samples:
            yield Block((min(samples, outer - sample), channels, inner), 0)
            continue
        step = max(1, _ELEMENTS // inner)
        for channel in range(0, channels, step):
            width = min(step, channels - channel)
            for position in range(0, inner, _ELEMENTS):
                yield Block((1, width, min(_ELEMENTS, inner - position)), channel)


def largest_block(outer: int, channels: int, inner: int) -> int:
    """Elements of the largest of the blocks."""
    return min(outer * channels * inner, max(_ELEMENTS, _samples(channels, inner) * channels * inner))


def add_block(values: Tensor, state: Tensor, block: Block) -> None:
    """Merge the moments of a block's values into `state` (see `sums`), which changes in place.

    Raises:
        StatisticsError: integers beyond 2^53.
    """
    from normcore._compiled import flat
    from normcore.statistics.sums import merge_block

    floating = values if values.is_floating_point() else exact_values("input", values).double()
    merge_block(flat(floating), state.numpy(), *block.shape, block.first_channel)


def _samples(channels: int, inner: int) -> int:
    """Samples in a block; 0 where one is more than a block."""
    sample = max(1, channels * inner)
    if inner < _SHORT_CHANNEL:
        return max(1, _ELEMENTS // sample, min(_SAMPLES, _LARGEST // sample))
    return _ELEMENTS // sample
