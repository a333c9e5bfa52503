"""Shards of a batch: tensors alike in all but the number of their samples, their masks and their sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normcore._checks import check_dense, check_rank
from normcore.errors import DtypeError, ParameterError, ShapeError
from normcore.normalization.batch_view import MAX_PARTS, BatchView


def check_shards(name: str, shards: Sequence[Tensor]) -> tuple[int, ...]:
    """The numbers of samples of tensors that are alike in all else."""
    if not shards:
        raise ShapeError(name, expected="one shard or more", received="none")
    first = shards[0]
    for index, shard in enumerate(shards):
        check_dense(f"{name}[{index}]", shard)
        check_rank(f"{name}[{index}]", shard, minimum=2)
        if shard.dtype != first.dtype:
            expected, received = (str(term.dtype).removeprefix("torch.") for term in (first, shard))
            raise DtypeError(f"{name}[{index}]", expected=f"{expected}, as the first", received=received)
        if shard.shape[1:] != first.shape[1:]:
            expected = f"shape (n, {', '.join(map(str, first.shape[1:]))}), as the first"
            raise ShapeError(f"{name}[{index}]", expected=expected, received=f"shape {tuple(shard.shape)}")
    return tuple(len(shard) for shard in shards)


def check_masks(
    masks: Sequence[Tensor] | None, shards: Sequence[Tensor], *, channel_axis: int
) -> Sequence[Tensor | None]:
    """The mask of each shard in the shard's shape without the channel axis."""
    if masks is None:
        return [None] * len(shards)
    if len(masks) != len(shards):
        raise ShapeError("masks", expected=f"{len(shards)}, one of each shard", received=f"{len(masks)}")
    views = [BatchView(shard, channel_axis) for shard in shards]
    own = (view.mask(mask) for view, mask in zip(views, masks, strict=True))
    return [None if mask is None else mask.squeeze(channel_axis) for mask in own]


def check_sizes(shard_sizes: Tensor, *, samples: int) -> list[int]:
    check_dense("shard_sizes", shard_sizes)
    if shard_sizes.dtype != torch.int64:
        received = str(shard_sizes.dtype).removeprefix("torch.")
        raise DtypeError("shard_sizes", expected="int64", received=received)
    if shard_sizes.ndim != 1 or not len(shard_sizes):
        expected = "shape (S,) of one shard or more"
        raise ShapeError("shard_sizes", expected=expected, received=f"shape {tuple(shard_sizes.shape)}")
    if len(shard_sizes) > MAX_PARTS:
        raise ShapeError("shard_sizes", expected=f"at most {MAX_PARTS} shards", received=f"{len(shard_sizes)}")
    sizes = [int(size) for size in shard_sizes]
    if min(sizes) < 0 or sum(sizes) != samples:
        raise ParameterError("shard_sizes", expected=f"sizes that sum to {samples} samples", received=f"{sizes}")
    return sizes
