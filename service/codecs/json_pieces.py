"""Large JSON in pieces: a parser holds the interpreter for as long as it runs, and every other request waits for it.

Arrays of numbers are cut out of the text, and what remains is parsed with a number nobody can guess in the place of
each. An array is cut again at commas and read piece by piece, each parsed between brackets of its own. The text is
valid JSON if what remains is, with every such number among its values, and if every piece is and is not empty: so
wherever we cut, text that is not JSON is never taken for it. Whatever is wrong or unusual is left to the parser of the
whole text, which alone words the refusals. It is also faster: elements become an array while the cache holds them.
"""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import orjson
import pydantic_core
from numpy.typing import NDArray

from service.codecs.buffers import MAX_RANK, Buffer
from service.codecs.json_text import parse_object
from service.errors import ServiceError

T = TypeVar("T")

PIECE_BYTES = 128 * 1024
_LARGE_BYTES = 64 * 1024  # of an array that is cut out
_REST_BYTES = 256 * 1024
_GAP_BYTES = 1024  # in which the next comma is looked for
_QUOTE, _OPEN, _CLOSE = b'"[]'

Places = NDArray[np.intp]


class UnusualError(ServiceError):
    """The whole text has to be parsed at once, to be understood or to be refused with the right words."""


@dataclass(slots=True)
class Pieces:
    """A large array that is still text. Iterate once: lists of its elements, in order."""

    texts: list[memoryview]
    is_read: bool = False

    def __iter__(self) -> Iterator[list[object]]:
        for text in self.texts:
            elements = _parsed(b"".join((b"[", text, b"]")))
            if not elements:
                raise UnusualError("nothing between two commas")
            yield elements
        self.is_read = True


def decode(text: Buffer, reader: Callable[[dict[str, object]], T]) -> T:
    """What `reader` makes of the JSON object; it may be called again after a failure, and must not mind `Pieces`.

    Raises:
        PayloadMalformedError: the text is no JSON object.
    """
    if len(text) > _LARGE_BYTES:
        try:
            document, arrays = _taken_apart(memoryview(text))
            result = reader(document)
            if all(array.is_read for array in arrays):
                return result
        except ServiceError:
            pass  # said again below, about the whole text
    return reader(parse_object(text))


def _parsed(text: bytes) -> list[object]:
    try:
        elements: list[object] = orjson.loads(text)
    except orjson.JSONDecodeError:
        if b"NaN" not in text and b"Infinity" not in text:
            raise UnusualError("not JSON") from None
        try:
            elements = pydantic_core.from_json(text)
        except ValueError:
            raise UnusualError("not JSON") from None
    return elements


def _taken_apart(text: memoryview) -> tuple[dict[str, object], list[Pieces]]:
    """The object with its large arrays as Pieces, and these."""
    spans = _spans(np.frombuffer(text, np.uint8))
    first = 2**61 + secrets.randbits(60)
    rest, held, position = bytearray(), dict[int, Pieces](), 0
    for number, (start, end, children) in enumerate(spans, first):
        rest += text[position:start]
        rest += b" %d " % number
        held[number] = Pieces(_cut(text, start + 1, end, children))
        position = end + 1
    rest += text[position:]
    if not held or len(rest) > _REST_BYTES:
        raise UnusualError("no arrays to take out, or too much beside them")
    arrays = list(held.values())
    document = {name: _put_back(value, held) for name, value in parse_object(rest).items()}
    if held:
        raise UnusualError("a number in the place of an array is not among the values")
    return document, arrays


def _put_back(value: object, held: dict[int, Pieces], *, levels: int = MAX_RANK) -> object:
    if not levels:
        raise UnusualError("a document so deep")
    if type(value) is dict:
        return {key: _put_back(item, held, levels=levels - 1) for key, item in value.items()}
    if type(value) is list:
        return [_put_back(item, held, levels=levels - 1) for item in value]
    return held.pop(value, value) if type(value) is int else value


def _spans(codes: NDArray[np.uint8]) -> Iterator[tuple[int, int, Places]]:
    """Where large arrays open and close, and where the arrays that are their elements close."""
    marks = _marks(codes)
    kinds = codes[marks]
    quotes = np.flatnonzero(kinds == _QUOTE)
    bounds = np.concatenate(([-1], quotes, [len(marks)]))
    edges = np.concatenate(([0], marks[quotes], [len(codes)]))
    for index in np.flatnonzero(np.diff(edges) > _LARGE_BYTES).tolist():
        between = slice(bounds[index] + 1, bounds[index + 1])
        yield from _spans_without_strings(marks[between], kinds[between] == _OPEN)


def _marks(codes: NDArray[np.uint8]) -> Places:
    found = []
    for start in range(0, len(codes), PIECE_BYTES):
        block = codes[start : start + PIECE_BYTES]
        found.append(np.flatnonzero((block == _QUOTE) | (block == _OPEN) | (block == _CLOSE)) + start)
    return np.concatenate(found)


def _spans_without_strings(marks: Places, is_open: NDArray[np.bool_]) -> Iterator[tuple[int, int, Places]]:
    """In the first array here, the arrays of the deepest level on which all are large."""
    skipped = int(is_open.argmax()) if is_open.any() else len(marks)
    depths = np.cumsum(np.where(is_open[skipped:], 1, -1))
    ends = np.flatnonzero(depths == 0)
    if not len(ends):
        return
    depths = depths[: ends[0] + 1]
    marks, is_open = marks[skipped:][: len(depths)], is_open[skipped:][: len(depths)]
    level = 0
    opens = closes = marks[:0]
    for depth in range(1, MAX_RANK):
        deeper_opens, deeper_closes = marks[is_open & (depths == depth)], marks[~is_open & (depths == depth - 1)]
        if not len(deeper_opens) or not (deeper_closes - deeper_opens > _LARGE_BYTES).all():
            break
        level, opens, closes = depth, deeper_opens, deeper_closes
    children = marks[~is_open & (depths == level)]
    for start, end in zip(opens.tolist(), closes.tolist(), strict=True):
        first, last = np.searchsorted(children, (start, end))
        yield start, end, children[first:last]


def _cut(text: memoryview, start: int, end: int, children: Places) -> list[memoryview]:
    """The text between two brackets, cut at commas between the elements that are arrays, or at any without such."""
    pieces: list[memoryview] = []
    while end - start > PIECE_BYTES:
        place = start + PIECE_BYTES
        if len(children):
            following = int(np.searchsorted(children, place))
            if following == len(children):
                break
            place = int(children[following])
        gap = bytes(text[place : min(place + _GAP_BYTES, end)])
        comma = place + gap.find(b",")
        if comma < place:
            break
        pieces.append(text[start:comma])
        start = comma + 1
    return [*pieces, text[start:end]]
