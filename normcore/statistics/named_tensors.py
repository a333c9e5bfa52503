"""Reading of a state from named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from normcore.errors import DtypeError, ShapeError, StatisticsError


def per_channel_named(tensors: Mapping[str, Tensor], name: str, *, num_features: int) -> Tensor:
    """A float64 tensor of one value per channel.

    Raises:
        StatisticsError: it is missing.
        DtypeError, ShapeError: it has another datatype or shape.
    """
    tensor = tensor_named(tensors, name)
    if tensor.dtype != torch.float64:
        raise DtypeError(name, expected="float64", received=str(tensor.dtype).removeprefix("torch."))
    if tensor.shape != (num_features,):
        raise ShapeError(name, expected=f"shape ({num_features},)", received=f"shape {tuple(tensor.shape)}")
    return tensor


def tensor_named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of this name, or StatisticsError."""
    if name not in tensors:
        raise StatisticsError(name, expected="a tensor of this name in the state", received="none")
    return tensors[name]
