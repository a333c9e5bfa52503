"""Named tensors in a file: where each lies and how it is laid out, read only when asked for."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from normcore.errors import CheckpointError

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The datatypes read and written, by the names of the safetensors format; all little-endian."""

MAX_RANK = 16
MAX_NAME_BYTES = 1024


@dataclass(frozen=True, slots=True)
class TensorLimits:
    """How much a file of named tensors may declare.

    Attributes:
        max_tensors: named tensors, and stored ones.
        max_header_bytes: the safetensors header or the pickle, whichever describes the tensors.
        max_bytes: all named tensors together, tensors with two names counted twice.
    """

    max_tensors: int = 200_000
    max_header_bytes: int = 16 << 20
    max_bytes: int = 64 << 30


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        datatype: a key of `DATATYPES`.
        offset: where its first element lies in the file, in bytes.
        strides: distance between neighbours of each axis, in elements.
    """

    datatype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return DATATYPES[self.datatype]

    @property
    def elements(self) -> int:
        return count(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        expected = contiguous_strides(self.shape)
        return all(
            size <= 1 or stride == wanted
            for size, stride, wanted in zip(self.shape, self.strides, expected, strict=True)
        )

    @property
    def span_bytes(self) -> int:
        """Distance from the first byte of the tensor to the one after its last."""
        if not self.elements:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A checked file of named tensors; the bytes of a tensor are read by `read`, never before.

    Attributes:
        tensors: by key, in the file's own order.
        keeps_order: whether that order is the one in which the model registered its tensors.
        other: other groups of tensors in the file, such as an optimizer's; never read.
        notes: what the owner should know about how the file was read.
    """

    path: Path
    format: Literal["safetensors", "torch_zip"]
    tensors: Mapping[str, Tensor]
    keeps_order: bool
    group: str = ""
    other: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def read(self, key: str) -> NDArray[Any]:
        """A copy of one tensor, C-contiguous."""
        with self.path.open("rb") as file:
            return read_tensor(file, self.tensors[key])


def read_tensor(file: BinaryIO, tensor: Tensor) -> NDArray[Any]:
    """A copy of one tensor, C-contiguous. Raises CheckpointError when the file has become shorter."""
    flat = np.frombuffer(_read_exactly(file, tensor.offset, tensor.span_bytes), tensor.dtype)
    if tensor.is_contiguous:
        return flat.reshape(tensor.shape)
    strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides))


def read_rows(file: BinaryIO, tensor: Tensor, *, elements: int) -> Iterator[NDArray[Any]]:
    """A tensor of rank 1 and up in blocks of whole rows (axis 0) of about `elements` elements.

    A tensor that is laid out otherwise than row by row is read whole.
    """
    per_row = max(count(tensor.shape[1:]), 1)
    step = max(elements // per_row, 1)
    if not tensor.is_contiguous:
        whole = read_tensor(file, tensor)
        for start in range(0, tensor.shape[0], step):
            yield whole[start : start + step]
        return
    row_bytes = count(tensor.shape[1:]) * tensor.dtype.itemsize
    for start in range(0, tensor.shape[0], step):
        rows = min(step, tensor.shape[0] - start)
        content = _read_exactly(file, tensor.offset + start * row_bytes, rows * row_bytes)
        yield np.frombuffer(content, tensor.dtype).reshape(rows, *tensor.shape[1:])


def count(shape: tuple[int, ...]) -> int:
    """Elements of a shape, in Python's unbounded integers."""
    total = 1
    for size in shape:
        total *= size
    return total


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """A shape read from a file. Raises CheckpointError."""
    if not isinstance(shape, list | tuple) or len(shape) > MAX_RANK:
        raise CheckpointError(f"tensor {quote(name)}: its shape is no list of at most {MAX_RANK} sizes")
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**63:
            raise CheckpointError(f"tensor {quote(name)}: {quote(str(size))} is no size")
    return tuple(shape)


def check_name(name: str) -> str:
    """A tensor's key read from a file. Raises CheckpointError."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise CheckpointError(f"tensor {quote(name)}: its name is not valid Unicode") from None
    if length > MAX_NAME_BYTES:
        raise CheckpointError(f"tensor {quote(name)}: its name has {length} bytes, more than {MAX_NAME_BYTES}")
    return name


def check_total(tensors: Mapping[str, Tensor], limits: TensorLimits) -> None:
    """Refuse tensors that are together larger than allowed: names may share bytes. Raises CheckpointError."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > limits.max_bytes:
        raise CheckpointError(f"the tensors are {total} bytes together, more than the {limits.max_bytes} allowed")


def quote(name: str) -> str:
    """A name out of a file, as it may stand in a message."""
    return repr(name if len(name) <= 120 else f"{name[:117]}...")


def _read_exactly(file: BinaryIO, offset: int, size: int) -> bytes:
    content = os.pread(file.fileno(), size, offset)
    while len(content) < size:  # one call gives 2 GiB at most
        more = os.pread(file.fileno(), size - len(content), offset + len(content))
        if not more:
            raise CheckpointError("the file became shorter while it was read")
        content += more
    return content


__all__ = [
    "DATATYPES",
    "MAX_RANK",
    "Tensor",
    "TensorFile",
    "TensorLimits",
    "check_name",
    "check_shape",
    "check_total",
    "contiguous_strides",
    "count",
    "quote",
    "read_rows",
    "read_tensor",
]
