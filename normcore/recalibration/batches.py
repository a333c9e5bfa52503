"""Batches of data for a network, checked against its inputs before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from normcore.checkpoints.onnx_shapes import tensor_type
from normcore.errors import DtypeError, ParameterError, ShapeError
from normcore.folding.interfaces import required_inputs

Batch = Mapping[str, NDArray[Any]]
"""One tensor per input of the network, by name."""


def check_batches(model: ModelProto, batches: Sequence[Batch]) -> None:
    """Refuse batches that the network cannot take.

    Raises:
        ParameterError: there is no batch, an input is missing, or a tensor is no input.
        DtypeError: a tensor has another datatype than the input.
        ShapeError: a tensor does not fit the input's shape, or is empty.
    """
    if not batches:
        raise ParameterError("batches", expected="at least one batch of data", received="none")
    inputs = {info.name: info for info in required_inputs(model)}
    for number, batch in enumerate(batches):
        place = f" of batch {number}" if len(batches) > 1 else ""
        for name in batch:
            if name not in inputs:
                expected = f"one of the inputs {', '.join(inputs)}"
                raise ParameterError(f"{name}{place}", expected=expected, received="an unknown name")
        for name, info in inputs.items():
            if name not in batch:
                raise ParameterError(f"{name}{place}", expected="a tensor", received="no such tensor")
            _check_tensor(f"{name}{place}", batch[name], info)


def _check_tensor(argument: str, array: NDArray[Any], info: ValueInfoProto) -> None:
    found = tensor_type(info)
    if found is None:
        raise DtypeError(argument, expected="a network whose inputs are tensors", received="another type of input")
    expected = np.dtype(helper.tensor_dtype_to_np_dtype(found.data_type))
    if array.dtype != expected:
        raise DtypeError(argument, expected=expected.name, received=array.dtype.name)
    if not array.size:
        raise ShapeError(argument, expected="at least one element", received=f"shape {list(array.shape)}")
    if found.shape is None:
        return
    fits = array.ndim == len(found.shape) and all(
        size in (None, received) for size, received in zip(found.shape, array.shape, strict=True)
    )
    if not fits:
        wanted = [-1 if size is None else size for size in found.shape]
        raise ShapeError(argument, expected=f"shape {wanted} (-1 is free)", received=f"shape {list(array.shape)}")


__all__ = ["Batch", "check_batches"]
