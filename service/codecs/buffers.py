"""Shapes, and arrays as views on a received body (and back: an array's bytes without a copy)."""

import math

import numpy as np

from service.codecs.json_text import describe
from service.datatypes import BOOL, Datatype
from service.engine.protocol import Tensor
from service.errors import PayloadMalformedError

Buffer = bytearray | memoryview | bytes
MAX_RANK = 64  # numpy's own limit
_MAX_BYTES = 2**62
_SMALL_BYTES = 4096  # below this a copy costs less than a view


def check_shape(shape: object, *, field: str) -> tuple[int, ...]:
    """Return a shape read from a body as a tuple; refuse what no array can have."""
    if type(shape) is not list:
        raise PayloadMalformedError(f"{field}: expected a list of non-negative integers, received {describe(shape)}")
    if len(shape) > MAX_RANK:
        raise PayloadMalformedError(f"{field}: expected at most {MAX_RANK} axes, received {len(shape)}")
    for size in shape:
        if type(size) is not int or size < 0:
            raise PayloadMalformedError(f"{field}: expected non-negative integers, received {describe(size)}")
    # numpy refuses a huge axis even where another one is 0
    if math.prod(size or 1 for size in shape) * 8 > _MAX_BYTES:
        raise PayloadMalformedError(f"{field}: expected at most {_MAX_BYTES // 8} elements, received more")
    return tuple(shape)


def check_size(received_bytes: int, datatype: Datatype, shape: tuple[int, ...], *, field: str) -> None:
    """Refuse a byte count that is not exactly the one of the datatype and shape."""
    expected_bytes = math.prod(shape) * datatype.itemsize
    if received_bytes != expected_bytes:
        raise PayloadMalformedError(
            f"{field}: expected {expected_bytes} bytes for {datatype.name} of shape {list(shape)}, "
            f"received {received_bytes}"
        )


def view(body: Buffer, offset: int, datatype: Datatype, shape: tuple[int, ...], *, field: str) -> Tensor:
    """Return a C-contiguous array on the body's memory, or on a copy where the offset is misaligned.

    The caller has checked that the bytes are there, and that the datatype is not BYTES.
    """
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, datatype.numpy)
    flat: Tensor = np.frombuffer(body, datatype.numpy, count, offset)
    if datatype is BOOL and flat.view(np.uint8).max() > 1:
        raise PayloadMalformedError(f"{field}: expected BOOL bytes of 0 and 1, received {flat.view(np.uint8).max()}")
    if not flat.flags.aligned:
        flat = flat.copy()
    return flat.reshape(shape)


def to_bytes(array: Tensor) -> bytes | memoryview:
    """Return the array's elements in C order as bytes; a view where the array is large and contiguous."""
    if array.nbytes <= _SMALL_BYTES:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
