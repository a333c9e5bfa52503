"""The one view of all layouts."""

import pytest
import torch

from normcore._box import box_of

LAST = torch.channels_last
IMAGES = torch.empty(2, 6, 3, 5)


@pytest.mark.parametrize(
    ("tensor", "reduced", "affine", "sizes", "per"),
    [
        (IMAGES, (0, 2, 3), (6, 1, 1), (1, 2, 6, 1, 15), 2),
        (IMAGES.to(memory_format=LAST), (0, 2, 3), (6, 1, 1), (1, 30, 6, 1, 1), 30),
        (IMAGES, (0, 2, 3), (2, 6, 1, 1), (1, 2, 6, 1, 15), 1),
        (IMAGES.to(memory_format=LAST), (0, 2, 3), (2, 6, 1, 1), (1, 30, 6, 1, 1), 15),
        (IMAGES, (2, 3), (6, 1, 1), (2, 1, 6, 1, 15), 2),
        (IMAGES.to(memory_format=LAST), (2, 3), (6, 1, 1), (2, 15, 6, 1, 1), 30),
        (IMAGES, (2, 3), (), (12, 1, 1, 1, 15), 12),
        (IMAGES, (1, 2, 3), (6, 3, 5), (2, 1, 1, 90, 1), 2),
        (IMAGES.view(2, 2, 3, 15), (2, 3), (2, 3, 1), (2, 1, 2, 3, 15), 2),
        (IMAGES.to(memory_format=LAST).view(2, 2, 3, 15), (2, 3), (2, 3, 1), (2, 15, 2, 3, 1), 30),
        (IMAGES, (1,), (), (2, 6, 15, 1, 1), 12),
        (IMAGES.transpose(0, 1), (1,), (), (1, 2, 90, 1, 1), 2),
        (IMAGES, (1, 2, 3), (5,), (2, 18, 1, 5, 1), 36),
        (torch.empty(1, 1), (0,), (1,), (1, 1, 1, 1, 1), 1),
    ],
)
def test_a_layout_is_its_box(
    tensor: torch.Tensor, reduced: tuple[int, ...], affine: tuple[int, ...], sizes: tuple[int, ...], per: int
) -> None:
    box = box_of(tensor.shape, tensor.stride(), reduced, affine)
    assert box is not None
    assert (box.sizes, box.per) == (sizes, per)


@pytest.mark.parametrize(
    ("tensor", "reduced", "affine"),
    [
        (IMAGES[:, ::2], (0, 2, 3), ()),
        (IMAGES[:, :1].expand(2, 6, 3, 5), (0, 2, 3), ()),
        (IMAGES.view(2, 3, 2, 3, 5), (1, 3), (5,)),
        (IMAGES, (0, 2, 3), (5,)),
    ],
    ids=["gaps", "expanded", "six turns", "weight along a part of what is reduced"],
)
def test_what_is_no_box_is_none(tensor: torch.Tensor, reduced: tuple[int, ...], affine: tuple[int, ...]) -> None:
    assert box_of(tensor.shape, tensor.stride(), reduced, affine) is None


TURNED = IMAGES.permute(1, 0, 2, 3)


@pytest.mark.parametrize(
    "tensor", [IMAGES, IMAGES.to(memory_format=LAST), TURNED], ids=["contiguous", "channels last", "turned"]
)
def test_statistics_and_parameters_come_back_as_they_went(tensor: torch.Tensor) -> None:
    shape = (*tensor.shape[:2], 1, 1)
    box = box_of(tensor.shape, tensor.stride(), (2, 3), shape)
    assert box is not None
    values = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(box.restore_statistics(box.statistics(values[None])), values[None])
    assert torch.equal(box.restore_parameters(box.parameters(values)), values)


def test_statistics_are_in_the_order_of_memory() -> None:
    box = box_of(TURNED.shape, TURNED.stride(), (2, 3))
    assert box is not None
    values = torch.arange(12.0).view(6, 2, 1, 1).double()
    assert torch.equal(box.statistics(values[None]), values.transpose(0, 1).reshape(1, 12))
