"""The binary tensor data extension of the Open Inference Protocol: tensors behind the JSON of a body."""

import math
import struct
from collections.abc import Sequence

import numpy as np

from service import datatypes
from service.codecs.buffers import Buffer, check_size, to_bytes, view
from service.datatypes import BYTES, Datatype
from service.engine.protocol import Tensor, TensorSpec
from service.errors import PayloadMalformedError

_LENGTH = struct.Struct("<I")


def cut(
    body: Buffer, offset: int, size_bytes: int, datatype: Datatype, shape: tuple[int, ...], *, field: str
) -> Tensor:
    """Return the tensor of `size_bytes` at the offset; its bytes have to be there and to fit its shape exactly."""
    rest = len(body) - offset
    if size_bytes > rest:
        raise PayloadMalformedError(f"{field}: expected {size_bytes} bytes of binary data, received {rest}")
    if datatype is BYTES:
        return _join_strings(_split(memoryview(body)[offset : offset + size_bytes], field=field), shape, field=field)
    check_size(size_bytes, datatype, shape, field=field)
    return view(body, offset, datatype, shape, field=field)


def decode_raw(body: Buffer, inputs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return the one input of a body without JSON, its shape found from the spec and the number of bytes.

    One free axis takes what the bytes give. Of two, a leading one is the batch and is 1.
    """
    if len(inputs) != 1:
        raise PayloadMalformedError(f"raw binary request: expected a model with one input, this one has {len(inputs)}")
    spec = inputs[0]
    field = f"raw binary input {spec.name!r}"
    datatype = datatypes.by_name(spec.datatype)
    if datatype is BYTES:
        elements = _split(memoryview(body), field=field)
        return {spec.name: _join_strings(elements, _raw_shape(spec, len(elements), field), field=field)}
    count, odd_bytes = divmod(len(body), datatype.itemsize)
    if odd_bytes:
        raise PayloadMalformedError(
            f"{field}: expected a multiple of {datatype.itemsize} bytes for {datatype.name}, received {len(body)}"
        )
    return {spec.name: view(body, 0, datatype, _raw_shape(spec, count, field), field=field)}


def encode(array: Tensor) -> bytes | memoryview:
    """Return the array as the extension writes it."""
    if array.dtype != np.object_:
        return to_bytes(array)
    pieces: list[bytes] = []
    for element in array.reshape(-1).tolist():
        pieces += (_LENGTH.pack(len(element)), element)
    return b"".join(pieces)


def _split(data: memoryview, *, field: str) -> list[bytes]:
    elements: list[bytes] = []
    position, end = 0, len(data)
    while position < end:
        start = position + _LENGTH.size
        length = _LENGTH.unpack_from(data, position)[0] if start <= end else 0
        position = start + length
        if position > end:
            missing = position - end
            raise PayloadMalformedError(
                f"{field}: expected 4 bytes of length and then as many bytes for element {len(elements)}, "
                f"received {missing} too few"
            )
        elements.append(bytes(data[start:position]))
    return elements


def _join_strings(elements: list[bytes], shape: tuple[int, ...], *, field: str) -> Tensor:
    if len(elements) != math.prod(shape):
        raise PayloadMalformedError(
            f"{field}: expected {math.prod(shape)} BYTES elements for shape {list(shape)}, received {len(elements)}"
        )
    result = np.empty(len(elements), np.object_)
    result[:] = elements
    return result.reshape(shape)


def _raw_shape(spec: TensorSpec, count: int, field: str) -> tuple[int, ...]:
    shape = list(spec.shape)
    if shape.count(-1) > 1 and shape[0] == -1:
        shape[0] = 1
    if shape.count(-1) > 1:
        raise PayloadMalformedError(f"{field}: its shape {list(spec.shape)} has more than one free axis, send JSON")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and known and count % known == 0:
        shape[shape.index(-1)] = count // known
    if -1 in shape or math.prod(shape) != count:
        raise PayloadMalformedError(
            f"{field}: expected the elements of shape {list(spec.shape)}, received {count} elements"
        )
    return tuple(shape)
