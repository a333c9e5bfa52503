"""The bridge between the service's arrays and torch's tensors: the same memory, seen as the other."""

import ml_dtypes
import numpy as np
import torch

from normcore.errors import DtypeError
from service.datatypes import Datatype
from service.engine.protocol import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_KINDS = "biuf"


def to_torch(array: Tensor, *, argument: str = "tensor") -> torch.Tensor:
    """A tensor over the array's memory; a copy where torch cannot share it (read-only, misaligned, reversed).

    Raises:
        DtypeError: the array holds no numbers that torch knows; `argument` names it.
    """
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(_shareable(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in _KINDS or array.dtype.itemsize > 8:
        raise DtypeError(
            argument,
            expected="a tensor of numbers or BOOL",
            received="BYTES" if array.dtype == object else str(array.dtype),
        )
    return torch.from_numpy(_shareable(array))


def torch_datatype(datatype: Datatype) -> torch.dtype:
    """Torch's name of a datatype of numbers or BOOL."""
    return to_torch(np.empty(0, datatype.numpy)).dtype


def from_torch(tensor: torch.Tensor) -> Tensor:
    """An array over the tensor's memory (a copy of it where the tensor is on another device)."""
    if tensor.dtype == torch.bfloat16:
        bits: Tensor = tensor.view(torch.int16).numpy(force=True)
        return bits.view(_BFLOAT16)
    array: Tensor = tensor.numpy(force=True)
    return array


def _shareable(array: Tensor) -> Tensor:
    is_shareable = (
        array.flags.writeable
        and array.flags.aligned
        and array.dtype.isnative
        and all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    )
    return array if is_shareable else np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
