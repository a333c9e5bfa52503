"""What may enter statistics: values that float64 holds exactly, and which of their positions count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normcore._checks import LARGEST_EXACT, check_mask
from normcore.errors import DtypeError, StatisticsError

# torch has few operations on these; the wider type holds the same numbers.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}
_LARGE = (torch.int64, torch.uint64)
_EXACT = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32),
)


def check_datatype(argument: str, datatype: torch.dtype) -> None:
    """Refuse what is neither floating, integer nor bool."""
    if datatype not in (*_EXACT, *_WIDER, *_LARGE):
        expected = "a floating, integer or bool datatype"
        raise DtypeError(argument, expected=expected, received=str(datatype).removeprefix("torch."))


def exact_values(argument: str, tensor: Tensor) -> Tensor:
    """The tensor, or its values in a datatype that torch computes with; each converts to float64 without rounding.

    Raises:
        DtypeError: a datatype that is neither floating, integer nor bool.
        StatisticsError: integers beyond 2^53.
    """
    check_datatype(argument, tensor.dtype)
    if tensor.dtype in _EXACT:
        return tensor
    if tensor.dtype in _WIDER:
        return tensor.to(_WIDER[tensor.dtype])
    # What uint64 has beyond int64 turns negative in this view.
    values = tensor.view(torch.int64)
    smallest = -LARGEST_EXACT if tensor.dtype == torch.int64 else 0
    if bool(((values > LARGEST_EXACT) | (values < smallest)).any()):
        expected = f"{str(tensor.dtype).removeprefix('torch.')} within +-2^53, which float64 holds exactly"
        raise StatisticsError(argument, expected=expected, received="larger ones")
    return values


def expanded_mask(argument: str, mask: Tensor, *, shape: Sequence[int], channel_axis: int) -> Tensor:
    """The mask expanded to `shape`.

    A mask of that rank broadcasts to the shape itself, and may so differ by channel; one of a lower rank broadcasts to
    the shape without the channel axis.

    Raises:
        DtypeError: a mask that is not bool.
        ShapeError: one that does not broadcast.
    """
    if mask.ndim == len(shape):
        check_mask(argument, mask, shape, meaning="the input's")
        return mask.expand(*shape)
    without = tuple(size for axis, size in enumerate(shape) if axis != channel_axis)
    check_mask(argument, mask, without, meaning=f"the input's {tuple(shape)} without the channel axis")
    return mask.expand(without).unsqueeze(channel_axis).expand(*shape)
