"""Lists of JSON numbers to arrays and back: exact integers, checked ranges, NaN and infinities."""

import math
from array import array as packed
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
import orjson

from service import datatypes
from service.codecs import json_numbers
from service.codecs.buffers import MAX_RANK
from service.codecs.json_pieces import Pieces, elements_of
from service.codecs.json_text import UnusualError, describe, name_of
from service.datatypes import BOOL, BYTES, FP32, Datatype
from service.engine.protocol import Tensor
from service.errors import NotAcceptableError, PayloadMalformedError

_PIECE_ELEMENTS = 16 * 1024
_MARK = b"\0"  # a byte that no JSON has: in strings it is escaped
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_array(data: object, datatype: Datatype, shape: tuple[int, ...], *, field: str) -> Tensor:
    """Return flat or nested row-major data as an array of the shape; its number of elements has to agree."""
    elements = _flatten(data, field)
    if elements.has_pieces:
        array = _pack_pieces(elements, datatype, lambda _: datatype)
        _check_nesting(array.size, array.shape, shape, field)
        return array.reshape(shape)
    _check_nesting(len(elements.flat), elements.shape, shape, field)
    return _pack(elements, datatype).reshape(shape)


def to_nested_array(data: object, datatype: Datatype, *, field: str) -> Tensor:
    """Return nested lists as an array of the shape of their nesting; all booleans make a BOOL array."""

    def choose(flat: list[object]) -> Datatype:
        is_bool = flat and type(flat[0]) is bool and all(type(element) is bool for element in flat)
        return BOOL if is_bool else datatype

    elements = _flatten(data, field)
    if elements.has_pieces:
        return _pack_pieces(elements, datatype, choose)
    return _pack(elements, choose(elements.flat)).reshape(elements.shape)


class Writer:
    """Writes a JSON document with tensors in it, large ones in chunks: nobody holds the interpreter for long."""

    def __init__(self, *, are_tokens_bare: bool) -> None:
        self._are_tokens_bare = are_tokens_bare
        self._large: list[Tensor] = []

    def data(self, array: Tensor) -> object:
        """What stands in the document for the flat row-major list of the elements."""
        if array.size <= _PIECE_ELEMENTS:
            return to_json(array, are_tokens_bare=self._are_tokens_bare)
        self._large.append(array.reshape(-1))
        return orjson.Fragment(_MARK)

    def chunks(self, document: object) -> list[bytes]:
        """The document's text; its tensors were asked for in the order in which they stand in it."""
        first, *others = _dumps(document).split(_MARK)
        texts = [first]
        for array, text in zip(self._large, others, strict=True):
            for start in range(0, array.size, _PIECE_ELEMENTS):
                piece = array[start : start + _PIECE_ELEMENTS]
                elements = _dumps(to_json(piece, are_tokens_bare=self._are_tokens_bare))
                texts.append((b"," if start else b"[") + memoryview(elements)[1:-1])
            texts.append(b"]" + text)
        return texts


def to_json(array: Tensor, *, are_tokens_bare: bool) -> Tensor | list[str] | orjson.Fragment:
    """What orjson writes as the flat row-major list of the elements."""
    if array.dtype == np.object_:
        return _texts(array)
    flat = np.ascontiguousarray(array).reshape(-1)
    if not datatypes.of(array).is_float:
        return flat
    with np.errstate(invalid="ignore"):  # raised by signaling NaN
        if flat.dtype.kind != "f":  # orjson knows no bfloat16
            flat = flat.astype(np.float32)
        is_finite = np.isfinite(flat)
    if is_finite.all():
        return flat
    names = [name_of(value) for value in flat[~is_finite].tolist()]
    tokens = names if are_tokens_bare else [f'"{name}"' for name in names]
    # in a flat list of numbers orjson writes null for these elements and for nothing else
    pieces = _dumps(flat).decode().split("null")
    return orjson.Fragment("".join(chain.from_iterable(zip(pieces, [*tokens, ""], strict=True))))


def _dumps(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass(frozen=True, slots=True)
class _Elements:
    """The scalars of nested lists in row-major order, the shape of the nesting, and the field they stand in."""

    flat: list[object]
    shape: tuple[int, ...]
    field: str

    @property
    def has_pieces(self) -> bool:
        return bool(self.flat) and type(self.flat[0]) is Pieces

    def refusal(self, index: int, expected: str) -> PayloadMalformedError:
        place: list[str] = []
        position = index
        for size in reversed(self.shape):
            position, axis_position = divmod(position, size)
            place.append(f"[{axis_position}]")
        where = "".join(reversed(place))
        return PayloadMalformedError(f"{self.field}{where}: expected {expected}, received {describe(self.flat[index])}")


def _flatten(data: object, field: str) -> _Elements:
    if type(data) is not list:
        return _Elements([data], (), field)
    level = _Elements(data, (len(data),), field)
    while level.flat and type(level.flat[0]) is list:
        if len(level.shape) == MAX_RANK:
            raise PayloadMalformedError(f"{field}: expected at most {MAX_RANK} levels of lists, received more")
        width = len(level.flat[0])
        rows = [row for row in level.flat if type(row) is list and len(row) == width]
        if len(rows) != len(level.flat):
            odd = next(i for i, row in enumerate(level.flat) if type(row) is not list or len(row) != width)
            raise level.refusal(odd, f"a list of {width} like the first one")
        level = _Elements(list(chain.from_iterable(rows)), (*level.shape, width), field)
    return level


def _check_nesting(count: int, nested: tuple[int, ...], shape: tuple[int, ...], field: str) -> None:
    if count != math.prod(shape):
        raise PayloadMalformedError(
            f"{field}: expected {math.prod(shape)} elements for shape {list(shape)}, received {count}"
        )
    if len(nested) == len(shape) and nested != shape:
        raise PayloadMalformedError(f"{field}: expected lists nested as {list(shape)}, received {list(nested)}")


def _pack_pieces(elements: _Elements, numeric: Datatype, choose: Callable[[list[object]], Datatype]) -> Tensor:
    """Large arrays of one shape, each read in pieces. Raises UnusualError where they are not that."""
    arrays: list[Tensor] = []
    shapes = set[tuple[int, ...]]()
    for pieces in elements.flat:
        if not isinstance(pieces, Pieces):
            raise UnusualError
        count = len(arrays)
        arrays += [_pack_piece(piece, elements.field, numeric, choose) for piece in pieces]
        shapes |= {(sum(map(len, arrays[count:])), *array.shape[1:]) for array in arrays[count:]}
    if len(shapes) != 1 or len({array.dtype for array in arrays}) != 1:
        raise UnusualError
    shape = (*elements.shape, *shapes.pop())
    if len(shape) > MAX_RANK:
        raise UnusualError
    return np.concatenate(arrays).reshape(shape)


def _pack_piece(piece: memoryview, field: str, numeric: Datatype, choose: Callable[[list[object]], Datatype]) -> Tensor:
    array = json_numbers.read(piece, numeric)
    if array is not None:
        return array
    try:
        inner = _flatten(elements_of(piece), field)
        return _pack(inner, choose(inner.flat)).reshape(inner.shape)
    except PayloadMalformedError:  # it has to name the place in the whole array
        raise UnusualError from None


def _pack(elements: _Elements, datatype: Datatype) -> Tensor:
    if not elements.flat:
        return np.empty(0, datatype.numpy)
    if datatype is BYTES:
        return _pack_texts(elements)
    code = _typecode(datatype)
    try:
        values = _convert(code, elements.flat)
    except (TypeError, OverflowError):
        values = _convert_named(code, elements, datatype)
    result: Tensor = np.frombuffer(values, code)
    if datatype is BOOL:
        if result.max() > 1:
            raise elements.refusal(int(np.argmax(result > 1)), _expected(datatype))
        return result.view(np.bool_)
    return _narrow(elements, result, datatype) if datatype.is_float else result


def _typecode(datatype: Datatype) -> str:
    if datatype is BOOL:
        return "B"
    # no array.array of float16 or bfloat16: they are rounded from double
    return "d" if datatype.is_float and datatype is not FP32 else datatype.numpy.char


def _convert(code: str, flat: list[object]) -> "packed[float]":
    # array.array, unlike numpy, refuses null, strings and integers out of range while it converts
    return packed(code, cast("list[float]", flat))


def _convert_named(code: str, elements: _Elements, datatype: Datatype) -> "packed[float]":
    flat = elements.flat
    if datatype.is_float:
        flat = [_NON_FINITE.get(element, element) if type(element) is str else element for element in flat]
    try:
        return _convert(code, flat)
    except (TypeError, OverflowError):
        index = next(index for index, element in enumerate(flat) if _is_refused(code, element))
        raise elements.refusal(index, _expected(datatype)) from None


def _is_refused(code: str, element: object) -> bool:
    try:
        _convert(code, [element])
    except (TypeError, OverflowError):
        return True
    return False


def _expected(datatype: Datatype) -> str:
    if datatype is BOOL:
        return "true or false"
    if datatype.is_float:
        return f'a number in the range of {datatype.name}, or "NaN", "Infinity", "-Infinity"'
    limits = np.iinfo(datatype.numpy)
    return f"an integer from {limits.min} to {limits.max} for {datatype.name}"


def _narrow(elements: _Elements, wide: Tensor, datatype: Datatype) -> Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        result: Tensor = wide.astype(datatype.numpy, copy=False)
    is_infinite = np.isinf(result)
    for index in np.flatnonzero(is_infinite).tolist() if is_infinite.any() else ():
        element = elements.flat[index]
        if isinstance(element, int | float) and not (isinstance(element, float) and math.isinf(element)):
            raise elements.refusal(index, _expected(datatype))
    return result


def _pack_texts(elements: _Elements) -> Tensor:
    result = np.empty(len(elements.flat), np.object_)
    for index, element in enumerate(elements.flat):
        if type(element) is not str:
            raise elements.refusal(index, "a string for BYTES")
        result[index] = element.encode()
    return result


def _texts(array: Tensor) -> list[str]:
    try:
        return [element.decode() for element in array.reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise NotAcceptableError(
            f"BYTES output: JSON carries UTF-8 text only ({error.reason}); ask for binary data"
        ) from None
