"""Large JSON in pieces: a parser holds the interpreter for as long as it runs, and every other request waits for it.

Arrays of numbers are cut out of the text, and what remains is parsed with a number nobody can guess in the place of
each. An array is cut again at commas and read piece by piece, each parsed between brackets of its own. The text is
valid JSON if what remains is, with every such number among its values, and if every piece is and is not empty: so
wherever we cut, text that is not JSON is never taken for it. Whatever is wrong or unusual is left to the parser of the
whole text, which alone words the refusals. Pieces are also what a reader that needs no interpreter is given first; see
json_numbers.
"""

import secrets
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import orjson
import pydantic_core
from numpy.typing import NDArray

from service.codecs.buffers import MAX_RANK, Buffer
from service.codecs.json_text import UnusualError, parse_object
from service.errors import PayloadMalformedError

T = TypeVar("T")

PIECE_BYTES = 128 * 1024
_REST_BYTES = 256 * 1024
_GAP_BYTES = 1024  # in which the next comma is looked for
_QUOTE, _OPEN, _CLOSE = b'"[]'

Places = NDArray[np.intp]


@dataclass(slots=True)
class Pieces:
    """A large array that is still text. Iterate once: the texts of its elements, in order, for `elements_of`."""

    texts: list[memoryview]

    def __iter__(self) -> Iterator[memoryview]:
        while self.texts:
            yield self.texts.pop()


def elements_of(piece: memoryview) -> list[object]:
    """What a piece has, parsed. Raises UnusualError where it is empty or no JSON."""
    elements = _parsed(b"".join((b"[", piece, b"]")))
    if not elements:
        raise UnusualError
    return elements


def decode(text: Buffer, reader: Callable[[dict[str, object]], T], *, piece_bytes: int = PIECE_BYTES) -> T:
    """What `reader` makes of a JSON object in which large arrays may be `Pieces`; it may be called a second time.

    Raises:
        PayloadMalformedError: the text is no JSON object.
    """
    if len(text) > piece_bytes:
        with suppress(UnusualError):
            return _decode_in_pieces(memoryview(text), reader, piece_bytes)
    return reader(parse_object(text))


def _decode_in_pieces(text: memoryview, reader: Callable[[dict[str, object]], T], piece_bytes: int) -> T:
    document, arrays = _taken_apart(text, piece_bytes)
    try:
        return reader(document)
    finally:
        for array in arrays:  # that the reader did not need, or not to the end: that it is no JSON is said first
            deque(map(elements_of, array), maxlen=0)


def _parsed(text: bytes) -> list[object]:
    try:
        elements: list[object] = orjson.loads(text)
    except orjson.JSONDecodeError:
        if b"NaN" not in text and b"Infinity" not in text:
            raise UnusualError from None
        try:
            elements = pydantic_core.from_json(text)
        except ValueError:
            raise UnusualError from None
    return elements


def _taken_apart(text: memoryview, piece_bytes: int) -> tuple[dict[str, object], list[Pieces]]:
    """The object with its large arrays as Pieces, and these."""
    spans = list(_spans(np.frombuffer(text, np.uint8), piece_bytes // 2))
    if not spans or len(text) - sum(end - start for start, end, _ in spans) > _REST_BYTES:
        raise UnusualError
    first = 2**61 + secrets.randbits(60)
    rest, held, position = bytearray(), dict[int, Pieces](), 0
    for number, (start, end, children) in enumerate(spans, first):
        rest += text[position:start]
        rest += b" %d " % number
        held[number] = Pieces(_cut(text[start + 1 : end], children - start - 1, piece_bytes))
        position = end + 1
    rest += text[position:]
    arrays = list(held.values())
    try:
        document = {name: _put_back(value, held) for name, value in parse_object(rest).items()}
    except PayloadMalformedError:
        raise UnusualError from None
    if held:
        raise UnusualError
    return document, arrays


def _put_back(value: object, held: dict[int, Pieces], *, levels: int = MAX_RANK) -> object:
    if not levels:
        raise UnusualError
    if type(value) is dict:
        return {key: _put_back(item, held, levels=levels - 1) for key, item in value.items()}
    if type(value) is list:
        return [_put_back(item, held, levels=levels - 1) for item in value]
    return held.pop(value, value) if type(value) is int else value


def _spans(codes: NDArray[np.uint8], large_bytes: int) -> Iterator[tuple[int, int, Places]]:
    """Where large arrays open and close, and where the arrays that are their elements close."""
    marks = _marks(codes)
    kinds = codes[marks]
    quotes = np.flatnonzero(kinds == _QUOTE)
    bounds = np.concatenate(([-1], quotes, [len(marks)]))
    edges = np.concatenate(([0], marks[quotes], [len(codes)]))
    for index in np.flatnonzero(np.diff(edges) > large_bytes).tolist():
        between = slice(bounds[index] + 1, bounds[index + 1])
        yield from _spans_without_strings(marks[between], kinds[between] == _OPEN, large_bytes)


def _marks(codes: NDArray[np.uint8]) -> Places:
    found = []
    for start in range(0, len(codes), PIECE_BYTES):
        block = codes[start : start + PIECE_BYTES]
        found.append(np.flatnonzero((block == _QUOTE) | (block == _OPEN) | (block == _CLOSE)) + start)
    return np.concatenate(found)


def _spans_without_strings(
    marks: Places, is_open: NDArray[np.bool_], large_bytes: int
) -> Iterator[tuple[int, int, Places]]:
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
        if not len(deeper_opens) or not (deeper_closes - deeper_opens > large_bytes).all():
            break
        level, opens, closes = depth, deeper_opens, deeper_closes
    children = marks[~is_open & (depths == level)]
    for start, end in zip(opens.tolist(), closes.tolist(), strict=True):
        first, last = np.searchsorted(children, (start, end))
        yield start, end, children[first:last]


def _cut(text: memoryview, children: Places, piece_bytes: int) -> list[memoryview]:
    """The last piece first: cut at commas between the elements that are arrays, or at any without such."""
    pieces: list[memoryview] = []
    start = 0
    while len(text) - start > piece_bytes:
        place = start + piece_bytes
        if len(children):
            following = int(np.searchsorted(children, place))
            if following == len(children):
                break
            place = int(children[following])
        comma = bytes(text[place : place + _GAP_BYTES]).find(b",")
        if comma < 0:
            break
        pieces.append(text[start : place + comma])
        start = place + comma + 1
    return [*pieces, text[start:]][::-1]
