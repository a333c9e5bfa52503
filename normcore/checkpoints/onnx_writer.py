"""A model on its way into a file, piece by piece: its weights together are never in memory a second time.

The library's own serializer makes one text of everything, which takes longer than the disk does.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]  # protobuf ships no types
from onnx import GraphProto, ModelProto, TensorProto

from normcore.checkpoints.onnx_structure import count_elements, element_bits

_LARGE = 1024
_RAW_DATA = TensorProto.DESCRIPTOR.fields_by_name["raw_data"]
_GRAPH = ModelProto.DESCRIPTOR.fields_by_name["graph"]
_INITIALIZER = GraphProto.DESCRIPTOR.fields_by_name["initializer"]
_LENGTH_DELIMITED = 2


def serialize(model: ModelProto) -> Iterator[bytes]:
    """The bytes of a model, in pieces that follow one another; large weights are pieces of their own."""
    messages = (model, model.graph, *model.graph.initializer)
    if any(len(UnknownFieldSet(message)) for message in messages):  # a newer format: only its own writer keeps it all
        yield model.SerializeToString()
        return
    for part in _fields(model):
        if isinstance(part, bytes):
            yield part
            continue
        parts = list(_fields(part))
        yield _frame(_GRAPH, sum(len(each) if isinstance(each, bytes) else _size_bytes(each) for each in parts))
        for each in parts:
            yield from (each,) if isinstance(each, bytes) else _weight(each)


def _fields(message: Any) -> Iterator[Any]:
    """Every field as bytes, but the graph and large weights, which are given as they are."""
    for descriptor, value in message.ListFields():
        if descriptor == _GRAPH:
            yield value
        elif descriptor.type == descriptor.TYPE_MESSAGE:
            for item in value:
                if descriptor == _INITIALIZER and _is_large(item):
                    yield item
                else:
                    content = item.SerializeToString()
                    yield _frame(descriptor, len(content)) + content
        else:
            yield type(message)(**{descriptor.name: value}).SerializeToString()


def _is_large(tensor: TensorProto) -> bool:
    return tensor.HasField("raw_data") and count_elements(tuple(tensor.dims)) > _LARGE


def _size_bytes(weight: TensorProto) -> int:
    head, length = _head(weight), _raw_bytes(weight)
    return len(_frame(_INITIALIZER, len(head) + length)) + len(head) + length


def _weight(weight: TensorProto) -> Iterator[bytes]:
    head, length = _head(weight), _raw_bytes(weight)
    yield _frame(_INITIALIZER, len(head) + length) + head
    content = weight.raw_data
    if len(content) != length:
        raise ValueError(f"tensor {weight.name!r}: expected {length} bytes, received {len(content)}")
    yield content


def _head(weight: TensorProto) -> bytes:
    """All of a weight but its content."""
    head = TensorProto()
    for descriptor in TensorProto.DESCRIPTOR.fields:
        if descriptor == _RAW_DATA:
            continue
        if descriptor.is_repeated:
            getattr(head, descriptor.name).extend(getattr(weight, descriptor.name))
        elif weight.HasField(descriptor.name):
            setattr(head, descriptor.name, getattr(weight, descriptor.name))
    described: bytes = head.SerializeToString()
    return described + _frame(_RAW_DATA, _raw_bytes(weight))


def _raw_bytes(weight: TensorProto) -> int:
    """What its shape says: to ask for the content is to copy it."""
    return (count_elements(tuple(weight.dims)) * element_bits(weight.data_type) + 7) // 8


def _frame(descriptor: Any, length: int) -> bytes:
    """What stands before the bytes of a field."""
    return _varint(descriptor.number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


__all__ = ["serialize"]
