"""The three-dimensional view: which dimension is what, the way back, and blocks that cover it once."""

import pytest
import torch

from normcore import _slab
from normcore._slab import Slab, blocks

CHANNELS = 3


def _tensor(shape: tuple[int, ...], channel_axis: int) -> torch.Tensor:
    """Each element holds its channel's number, plus a part below 1 that tells elements apart."""
    numbers = torch.arange(CHANNELS).view([-1 if axis == channel_axis else 1 for axis in range(len(shape))])
    return numbers + torch.linspace(0, 0.9, torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4, 3), 1),
        ((3, 4), 0),
        ((2, 3, 5), 1),
        ((2, 5, 3), 2),
        ((2, 3, 4, 5), 1),
        ((2, 4, 3, 5), 2),
        ((2, 3, 2, 2, 2), 1),
    ],
)
def test_slab_has_the_channels_in_the_middle_and_the_way_back(shape: tuple[int, ...], axis: int) -> None:
    tensor = _tensor(shape, axis)
    slab = Slab.of(tensor, channel_axis=axis)
    assert slab.values.shape[1] == CHANNELS
    assert slab.count == tensor.numel() // CHANNELS
    assert torch.equal(slab.values.floor().amin((0, 2)), torch.arange(3.0))
    assert torch.equal(slab.values.floor().amax((0, 2)), torch.arange(3.0))
    assert slab.values.data_ptr() == tensor.data_ptr()
    assert torch.equal(slab.restore(slab.values), tensor)


@pytest.mark.parametrize("rank", [4, 5])
def test_slab_of_channels_last_is_a_view_and_keeps_the_format(rank: int) -> None:
    memory_format = torch.channels_last if rank == 4 else torch.channels_last_3d
    tensor = _tensor((2, 3, 4, 5, 2)[:rank], 1).to(memory_format=memory_format)
    slab = Slab.of(tensor, channel_axis=1)
    assert slab.values.data_ptr() == tensor.data_ptr()
    restored = slab.restore(slab.values.clone())
    assert torch.equal(restored, tensor)
    assert restored.is_contiguous(memory_format=memory_format)


def test_slab_of_a_tensor_with_gaps_is_a_copy() -> None:
    tensor = _tensor((2, 3, 4, 6), 1)[..., ::2]
    slab = Slab.of(tensor, channel_axis=1)
    assert slab.values.is_contiguous()
    assert torch.equal(slab.restore(slab.values), tensor)


@pytest.mark.parametrize("shape", [(7, 3, 5), (1, 3, 50), (40, 3, 1), (2, 100, 1), (2, 100, 3), (1, 1, 1)])
def test_blocks_cover_every_element_once(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 32
    monkeypatch.setattr(_slab, "_BLOCK_ELEMENTS", limit)
    values = torch.zeros(shape)
    parts = blocks(values)
    for part in parts:
        part.add_(1.0)
        assert part.numel() <= max(limit, shape[1], shape[1] * shape[2] if shape[1] * shape[2] <= 8 * limit else 0)
    assert torch.equal(values, torch.ones(shape))
