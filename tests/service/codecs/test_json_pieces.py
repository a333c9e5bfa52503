"""Reading in pieces and reading the whole are one thing, whatever the text is and wherever it is cut."""

import random
from collections.abc import Callable

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import datatypes
from service.codecs import json_numbers, json_pieces, json_v1, oip
from service.codecs.json_pieces import Pieces, elements_of
from service.codecs.json_tensors import Writer, to_array, to_nested_array
from service.codecs.json_text import parse_object
from service.datatypes import FP32
from service.engine.protocol import Tensor
from service.errors import PayloadMalformedError
from tests.service.codecs.strategies import arrays, assert_same_bits

PIECE_BYTES = 24

Document = dict[str, object]

thorough = settings(deadline=None, max_examples=150)
numbers = st.integers(-(2**63), 2**64 - 1) | st.integers(-9, 9) | st.floats(width=32)
scalars = numbers | st.none() | st.booleans() | st.text('a"\\[]{},:é\0', max_size=6)
lists_of_numbers = st.recursive(
    st.lists(numbers, min_size=4, max_size=30), lambda inner: st.lists(inner, min_size=1, max_size=8), max_leaves=12
)
values = st.recursive(
    scalars | lists_of_numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab"[', max_size=3), inner, max_size=3),
    max_leaves=12,
)
documents = st.dictionaries(st.text("abcdefgh", max_size=2), lists_of_numbers | values, max_size=4)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """JSON objects with large arrays, written with or without white space, and a few bytes of them changed."""
    text = _written(draw(documents), draw(st.sampled_from(["", " ", "\n  "])))
    mutable = bytearray(text.encode())
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.integers(0, len(mutable)))
        mutable[place : place + draw(st.integers(0, 2))] = draw(
            st.sampled_from([b"", b",", b"[", b"]", b'"', b"\\", b"1", b"-", b"e", b" ", b"{", b":", b"NaN", b"\xff"])
        )
    return bytes(mutable)


def _written(value: object, space: str) -> str:
    if isinstance(value, dict):
        items = [f"{_written(key, space)}:{space}{_written(item, space)}" for key, item in value.items()]
        return "{" + f",{space}".join(items) + "}"
    if isinstance(value, list):
        return f"[{space}" + f"{space},{space}".join(_written(item, space) for item in value) + f"{space}]"
    if isinstance(value, float) and value != value:
        return "NaN"
    if isinstance(value, float) and abs(value) == float("inf"):
        return "Infinity" if value > 0 else "-Infinity"
    return orjson.dumps(value).decode()


def whole(value: object) -> object:
    """The document with its pieces joined."""
    if isinstance(value, Pieces):
        return [whole(element) for piece in value for element in elements_of(piece)]
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    json_numbers.warm_up()


def outcome(call: Callable[[], object]) -> str:
    try:
        return repr(call())
    except PayloadMalformedError as error:
        return f"refused: {error}"


@thorough
@given(text=texts(), piece_bytes=st.sampled_from([2, 8, PIECE_BYTES, 60]))
def test_pieces_are_what_the_whole_is_and_refuse_what_it_refuses(text: bytes, piece_bytes: int) -> None:
    found = outcome(lambda: json_pieces.decode(text, whole, piece_bytes=piece_bytes))
    assert found == outcome(lambda: parse_object(text))


@thorough
@given(text=texts(), name=st.sampled_from(["FP32", "INT64", "BOOL", "UINT8", "FP16"]))
def test_tensors_and_their_refusals_do_not_depend_on_pieces(text: bytes, name: str) -> None:
    def tensors(document: Document) -> object:
        return [
            (array.dtype, array.shape, array.tobytes())
            for field, data in document.items()
            for array in (
                to_nested_array(data, FP32, field=field),
                to_array(data, datatypes.by_name(name), (2, 6), field=field),
            )
            if isinstance(data, list | Pieces)
        ]

    found = outcome(lambda: json_pieces.decode(text, tensors, piece_bytes=PIECE_BYTES))
    assert found == outcome(lambda: tensors(parse_object(text)))


@pytest.mark.parametrize(
    "data",
    [
        [1.5] * 100,
        [[1.5] * 10] * 10,
        [[[0.25, 2]] * 3] * 20,
        [[[1.5] * 100]] * 2,
        [True, False] * 50,
        [1, float("nan"), float("-inf")] * 30,
    ],
    ids=["flat", "rows", "small rows", "few long rows", "booleans", "not finite"],
)
@pytest.mark.parametrize("space", ["", "\n "], ids=["dense", "spaced"])
def test_large_arrays_are_read_in_pieces(data: list[object], space: str) -> None:
    read: list[int] = []

    def reader(document: Document) -> Tensor:
        read.append(_count(document["data"]))
        return to_nested_array(document["data"], FP32, field="data")

    text = _written({"name": "[x,]", "data": data, "shape": [1, 2]}, space).encode()
    array = json_pieces.decode(text, reader, piece_bytes=PIECE_BYTES)
    assert len(read) == 1, "read again as a whole"
    assert read[0] > 5
    assert_same_bits(array, to_nested_array(data, FP32, field="data"))


def _count(value: object) -> int:
    if isinstance(value, Pieces):
        return len(value.texts)
    return sum(map(_count, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize(
    "text",
    [
        b'{"data": [1,2,3,4,5,6,7,8,9,,1,2,3,4]}',
        b'{"data": [1,2,3,4,5,6,7,8,9,1,2,3,4,]}',
        b'{"data": [1,2,3,4,5,6,7,8,9,1 2,3,4]}',
        b'{"data": [1,2,3,4,5,6],[7,8,9,1,2,3,4]}',
        b'{"data": [[1,2,3,4,5,6],[7,8,9,1,2,3,4]}',
        b'{"data": [[1,2,3,4,5,6],[7,8,9,1,2,3,4]]]}',
        b'{"data": 1[1,2,3,4,5,6,7,8,9,1,2,3,4,5]}',
        b'{"data": [1,2,3,4,5,6,7,8,9,1,2,3,4,5]1}',
        b'{"data": -[1,2,3,4,5,6,7,8,9,1,2,3,4,5]}',
        b"{[1,2,3,4,5,6,7,8,9,1,2,3,4,5]: 1}",
        b'{"data": "\\[1,2,3,4,5,6,7,8,9,1,2,3,4,5]"}',
        b'{"data": [1,2,3,4,5,6,7,8,9,1,2,3,4,5]',
        b'{"a": [1,2,3,4,5,6,7,8,9,1,2,3,4,5], "b": [1,2,3,4,5,6,7,8,9,1,2,03,4]}',
        b'{"a": 1} [1,2,3,4,5,6,7,8,9,1,2,3,4,5]',
        b"[1,2,3,4,5,6,7,8,9,1,2,3,4,5]",
        b'{"data": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"a":' * 600 + b"[1,2,3,4,5,6,7,8,9,1,2,3,4,5]" + b"}" * 600 + b"]",
    ],
)
def test_text_that_is_no_json_is_refused_in_the_words_of_the_whole_parser(text: bytes) -> None:
    with pytest.raises(PayloadMalformedError) as expected:
        parse_object(text)
    with pytest.raises(PayloadMalformedError) as error:
        json_pieces.decode(text, lambda _: None, piece_bytes=PIECE_BYTES)
    assert str(error.value) == str(expected.value)


def test_the_last_of_two_equal_keys_counts() -> None:
    text = b'{"data": [1,2,3,4,5,6,7,8,9,1,2,3,4], "data": [5,5,5,5,5,5,5,5,5,5,5,5,5,5,5]}'
    assert json_pieces.decode(text, whole, piece_bytes=PIECE_BYTES) == {"data": [5] * 15}


def test_brackets_in_a_string_are_no_array() -> None:
    document = {"text": "[" + "1," * 50 + "1]", "data": [1] * 30}
    assert json_pieces.decode(orjson.dumps(document), whole, piece_bytes=PIECE_BYTES) == document


def _request(array: Tensor, **changes: object) -> bytes:
    entry = {"name": "x", "shape": array.shape, "datatype": "FP32", "data": array.tolist()} | changes
    return orjson.dumps({"inputs": [entry]}, option=orjson.OPT_SERIALIZE_NUMPY)


@pytest.mark.parametrize("shape", [(60_000,), (200, 300), (2, 30_000), (3, 4, 5000)], ids=str)
def test_large_requests_of_either_surface_keep_every_bit(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert_same_bits(oip.decode_request(_request(array), None).inputs["x"], array)
    body = orjson.dumps({"input": array.tolist()})
    assert len(body) > 2 * json_pieces.PIECE_BYTES
    assert_same_bits(json_v1.decode(body, tensor_names=["input"]).tensors["input"], array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [7, 7]}, r"input 'x'.data: expected 49 elements for shape \[7, 7\], received 60000"),
        ({"datatype": "FP33"}, "input 'x'.datatype: expected one of"),
        ({"datatype": "INT8"}, r"input 'x'.data\[0\]: expected an integer from -128 to 127 for INT8, received 0.5"),
        ({"data": [0.5] * 50_000 + [None] * 10_000}, r"input 'x'.data\[50000\]: expected a number"),
        ({"data": 0, "extra": [0.5] * 60_000}, "input 'x'.data: expected 60000 elements"),
        ({"shape": [1] * 60_000}, r"input 'x'.shape: expected at most 64 axes, received 60000"),
        ({"name": [0] * 60_000}, r"inputs\[0\].name: expected a string, received a list of 60000"),
    ],
    ids=["count", "datatype", "element", "null", "scalar", "shape", "name"],
)
def test_refusals_of_large_requests_name_field_and_place(changes: Document, message: str) -> None:
    array = np.full((60_000,), 0.5, np.float32)
    with pytest.raises(PayloadMalformedError, match=message):
        oip.decode_request(_request(array, **changes), None)


@settings(deadline=None, max_examples=60)
@given(array=arrays(), repeats=st.sampled_from([1, 40_000]), are_tokens_bare=st.booleans())
def test_a_large_tensor_is_written_as_its_parts_are(array: Tensor, repeats: int, are_tokens_bare: bool) -> None:
    many = np.tile(array.reshape(-1), repeats if array.size else 1)
    writer = Writer(are_tokens_bare=are_tokens_bare)
    document = {"name": "a\0b", "data": writer.data(many), "more": [{"data": writer.data(array)}]}
    chunks = writer.chunks(document)
    assert max(map(len, chunks)) < 600_000
    single = Writer(are_tokens_bare=are_tokens_bare)
    (part,) = single.chunks(single.data(array))
    copies = b",".join([part[1:-1]] * (len(many) // max(1, array.size)))
    assert b"".join(chunks) == b'{"name":"a\\u0000b","data":[' + copies + b'],"more":[{"data":' + part + b"}]}"


def test_random_cuts_of_a_long_text_change_nothing() -> None:
    seeded = random.Random(7)
    data = [[seeded.uniform(-9, 9) for _ in range(7)] for _ in range(300)]
    text = orjson.dumps({"data": data})
    for piece_bytes in (4, 31, 100, 1000, 10_000):
        assert json_pieces.decode(text, whole, piece_bytes=piece_bytes) == {"data": data}
