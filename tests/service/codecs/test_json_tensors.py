import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given

from service import datatypes
from service.codecs import json_text
from service.codecs.json_tensors import to_array, to_json, to_nested_array
from service.engine.protocol import Tensor
from service.errors import NotAcceptableError, PayloadMalformedError
from tests.service.codecs.strategies import arrays, assert_same_bits, assert_same_numbers, thorough


def to_text(array: Tensor, *, are_tokens_bare: bool) -> bytes:
    return orjson.dumps(to_json(array, are_tokens_bare=are_tokens_bare), option=orjson.OPT_SERIALIZE_NUMPY)


@pytest.mark.parametrize("are_tokens_bare", [True, False], ids=["bare", "quoted"])
@thorough
@given(array=arrays())
def test_flat_data_round_trips_every_datatype(array: Tensor, are_tokens_bare: bool) -> None:
    data = json_text.parse(to_text(array, are_tokens_bare=are_tokens_bare))
    assert_same_numbers(to_array(data, datatypes.of(array), array.shape, field="x"), array)


@thorough
@given(array=arrays())
def test_nested_data_round_trips_every_datatype(array: Tensor) -> None:
    with np.errstate(invalid="ignore"):  # raised by signaling NaN
        data = array.astype(np.float64).tolist() if array.dtype == ml_dtypes.bfloat16 else array.tolist()
    assert_same_numbers(to_array(data, datatypes.of(array), array.shape, field="x"), array)
    if array.size:
        assert_same_numbers(to_nested_array(data, datatypes.of(array), field="x"), array)


def test_strided_arrays_are_written_in_row_major_order() -> None:
    assert to_text(np.arange(6, dtype=np.int8).reshape(2, 3).T, are_tokens_bare=True) == b"[0,3,1,4,2,5]"


def test_numbers_that_are_not_finite_keep_their_places_and_signs() -> None:
    array = np.array([np.nan, 1, -np.inf, np.inf, 2, np.nan], np.float32)
    assert to_text(array, are_tokens_bare=True) == b"[NaN,1.0,-Infinity,Infinity,2.0,NaN]"
    assert to_text(array, are_tokens_bare=False) == b'["NaN",1.0,"-Infinity","Infinity",2.0,"NaN"]'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("INT8", [0, 128], r"x\[1\]: expected an integer from -128 to 127 for INT8, received 128"),
        ("UINT8", [0, -1], r"x\[1\]: expected an integer from 0 to 255 for UINT8, received -1"),
        ("UINT64", [0, 2.0**64], r"x\[1\]: expected an integer from 0 to 18446744073709551615"),
        ("INT64", [0, 2**63], r"x\[1\]: expected an integer from -9223372036854775808"),
        ("INT32", [0, 1.5], r"x\[1\]: expected an integer .*, received 1.5"),
        ("INT32", [0, "NaN"], r"x\[1\]: expected an integer .*, received 'NaN'"),
        ("INT32", [0, None], r"x\[1\]: expected an integer .*, received null"),
        ("BOOL", [True, 2], r"x\[1\]: expected true or false, received 2"),
        ("BOOL", [True, 0.0], r"x\[1\]: expected true or false, received 0.0"),
        ("BOOL", [True, 300], r"x\[1\]: expected true or false, received 300"),
        ("FP32", [0, 1e39], r"x\[1\]: expected a number in the range of FP32, or .*, received 1e\+39"),
        ("FP32", [0, 10**39], r"x\[1\]: expected a number in the range of FP32"),
        ("FP16", [0, 65520], r"x\[1\]: expected a number in the range of FP16.*, received 65520"),
        ("BF16", [0, 3.4e38], r"x\[1\]: expected a number in the range of BF16"),
        ("FP64", [0, 10**400], r"x\[1\]: expected a number in the range of FP64"),
        ("FP32", ["NaN", "1.5"], r"x\[1\]: expected a number .*, received '1.5'"),
        ("FP32", ["Infinity", "inf"], r"x\[1\]: expected a number .*, received 'inf'"),
        ("FP32", [0, None], r"x\[1\]: expected a number .*, received null"),
        ("FP32", [0, {}], r"x\[1\]: expected a number .*, received an object of 0"),
        ("FP32", [0, [1]], r"x\[1\]: expected a number .*, received a list of 1"),
        ("FP32", [[0], 1], r"x\[1\]: expected a list of 1 like the first one, received 1"),
        (
            "FP32",
            [[[1], [2]], [[3], [4, 5]]],
            r"x\[1\]\[1\]: expected a list of 1 like the first one, received a list of 2",
        ),
        ("FP32", [[1, 2], [3, None]], r"x\[1\]\[1\]: expected a number"),
        ("FP32", [[1, 2], "ab"], r"x\[1\]: expected a list of 2 like the first one, received 'ab'"),
        ("BYTES", ["a", 1], r"x\[1\]: expected a string for BYTES, received 1"),
    ],
)
def test_to_array_refuses_an_element_and_names_its_place(name: str, data: list[object], message: str) -> None:
    shape = (4,) if isinstance(data[0], list) and len(data[0]) == 2 else (2,)
    with pytest.raises(PayloadMalformedError, match=message):
        to_array(data, datatypes.by_name(name), shape, field="x")


@pytest.mark.parametrize("name", ["FP16", "BF16", "FP32", "FP64"])
def test_infinity_is_accepted_where_a_number_out_of_range_is_not(name: str) -> None:
    array = to_array(["Infinity", -np.inf, 1], datatypes.by_name(name), (3,), field="x")
    assert array.astype(np.float64).tolist() == [np.inf, -np.inf, 1]


def test_to_array_takes_other_nestings_of_the_right_count() -> None:
    fp32 = datatypes.by_name("FP32")
    for data in ([1, 2, 3, 4], [[[1, 2, 3, 4]]], [[[1, 2], [3, 4]]]):
        assert to_array(data, fp32, (2, 2), field="x").tolist() == [[1, 2], [3, 4]]


def test_to_array_refuses_a_transposed_nesting() -> None:
    with pytest.raises(PayloadMalformedError, match=r"x: expected lists nested as \[3, 2\], received \[2, 3\]"):
        to_array([[1, 2, 3], [4, 5, 6]], datatypes.by_name("FP32"), (3, 2), field="x")


def test_to_array_refuses_a_wrong_count() -> None:
    with pytest.raises(PayloadMalformedError, match=r"x: expected 4 elements for shape \[2, 2\], received 3"):
        to_array([1, 2, 3], datatypes.by_name("FP32"), (2, 2), field="x")


def test_nesting_ends_at_the_rank_that_arrays_have() -> None:
    deepest: object = 1.0
    for _ in range(64):
        deepest = [deepest]
    assert to_nested_array(deepest, datatypes.by_name("FP32"), field="x").ndim == 64
    with pytest.raises(PayloadMalformedError, match="x: expected at most 64 levels of lists"):
        to_nested_array([deepest], datatypes.by_name("FP32"), field="x")


def test_booleans_alone_make_a_bool_array() -> None:
    assert to_nested_array([[True], [False]], datatypes.by_name("FP32"), field="x").dtype == np.bool_
    assert to_nested_array([True, 2], datatypes.by_name("FP32"), field="x").dtype == np.float32


def test_strings_are_utf8_both_ways() -> None:
    array = to_array(["é", ""], datatypes.BYTES, (2,), field="x")
    assert_same_bits(array, np.array(["é".encode(), b""], np.object_))
    assert to_text(array, are_tokens_bare=True) == '["é",""]'.encode()


def test_bytes_that_are_no_text_are_not_acceptable_as_json() -> None:
    with pytest.raises(NotAcceptableError, match="ask for binary data"):
        to_json(np.array([b"\xff"], np.object_), are_tokens_bare=True)
