"""Numbers in text: the nearest double to each, or left to be read by other means; never another one."""

import math
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from normcore.decimals import read_decimals

thorough = settings(deadline=None, max_examples=600)

digits = st.integers(1, 10**19 - 1).map(str) | st.integers(1, 2**54).map(str)


@st.composite
def written(draw: st.DrawFn) -> str:
    """A number as JSON allows it to be written."""
    whole = draw(st.sampled_from(["0", "9007199254740993", "1"]) | digits)
    fraction = draw(st.just("") | st.from_regex(r"\.(0{0,24}[0-9]{1,25}|[0-9]{1,4})", fullmatch=True))
    power = draw(st.just("") | st.from_regex(r"[eE][+-]?(0{0,3}[0-9]{1,2}|3[0-5][0-9])", fullmatch=True))
    return draw(st.sampled_from(["", "-"])) + whole + fraction + power


@st.composite
def halfway(draw: st.DrawFn) -> str:
    """What lies between two neighbouring doubles, cut off to some digits: many of them leave the nearest open."""
    low = draw(st.floats(min_value=0, max_value=1e300, allow_subnormal=True))
    middle = (Fraction(low) + Fraction(math.nextafter(low, math.inf))) / 2
    return f"{Decimal(middle.numerator) / Decimal(middle.denominator):.{draw(st.integers(15, 21))}e}"


def as_parsed(text: str) -> Any:
    """What a JSON parser makes of it as a number of float64; None where it refuses it."""
    try:
        return np.float64(orjson.loads(text))
    except orjson.JSONDecodeError:
        return None


@thorough
@given(text=written() | halfway() | st.floats(allow_nan=False, allow_infinity=False).map(repr))
@example("-0")
@example("-0.0")
@example("-0e5")
@example("1e400")
@example("1e-400")
@example("4.9e-324")
@example("2.4703282292062327e-324")
@example("2.4703282292062328e-324")
@example("2.2250738585072011e-308")
@example("2.2250738585072014e-308")
@example("1.7976931348623157e308")
@example("1.7976931348623159e308")
@example("179769313486231580793e289")
@example("9007199254740993")
@example("9007199254740993e1")
@example("9007199254740993.0")
@example("9007199254740993.0000000000000000001")
@example("18446744073709551615")
@example("18446744073709551616")
@example("1e22")
@example("1e23")
@example("8.5e-23")
@example("7.2057594037927933e16")
@example("0.000000000000000000000000000000001")
@example("500000000000000000e-18")
@example("0e99999999999")
@example("1e00000000000000000000000000001")
def test_a_number_is_the_nearest_double_or_left_alone(text: str) -> None:
    found = read_decimals(text.encode())
    expected = as_parsed(text)
    if found is None:
        return
    assert expected is not None
    assert found.shape == (1,)
    assert found.tobytes() == expected.tobytes()
    if text != "-0":  # an integer to a parser, and integers have no -0
        assert found[0] == float(text)


@thorough
@given(value=st.floats(allow_nan=False, allow_infinity=False), places=st.integers(0, 16))
@example(0.1, 16)
@example(1e-7, 16)
@example(5e-300, 16)
@example(float(np.float32(0.1)), 16)
def test_what_programs_write_is_read(value: float, places: int) -> None:
    for text in (repr(value), f"{value:.{places}e}", f"{np.float32(min(max(value, -1e38), 1e38))}"):
        if abs(float(text)) > 1e-300 or float(text) == 0:
            found = read_decimals(text.encode())
            is_infinite = as_parsed(text) is None  # rounded up beyond the largest
            assert found is None if is_infinite else found is not None and found[0] == float(text), text


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "01", "-01", "00", "+1", ".5", "1.", "1.e5", "-", "--1", "1e", "1e+", "1e+-1", "0x1", "1_0", "1 2"),
        *("1,", ",1", "1,,2", "1;2", "1\0", "1\x0b", "\xa01", "NaN", "Infinity", "-Infinity", "null", "true", '"1"'),
        *("[", "]", "[]", "[1", "1]", "[1]]", "[[1]", "[1][2]", "[1],2", "1,[2]", "[1],[2,3]", "[1,2],[3]", "[1,]"),
        *("[1],[[2]]", "[[1]],[2]", "[1],[]", "[[1],[2]],[[3]]", "[1],[2]],[3]", "{}", "[" * 63 + "1" + "]" * 63),
        "[" * 5000 + "1" + "]" * 5000,
        "1e400",
        "-1" + "0" * 400,
        "0.1000000000000000055511151231257827",
    ],
)
def test_whatever_else_there_is_is_left_alone(text: str) -> None:
    assert read_decimals(text.encode()) is None
    assert read_decimals(text.encode(), are_integers=True) is None


@thorough
@given(
    array=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)).map(
        lambda shape: np.random.default_rng(sum(shape)).standard_normal(shape)
    ),
    space=st.text(" \t\n\r", max_size=3),
)
def test_lists_in_lists_are_read_as_they_are_nested(array: np.ndarray[Any, Any], space: str) -> None:
    for values in (array, array[0], array[0, 0], array[0, 0, 0]):
        text = (
            repr(values.tolist())[1:-1].replace(" ", space).replace("[", space + "[" + space).replace("]", f"{space}]")
        )
        found = read_decimals((space + text + space).encode())
        assert found is not None
        assert found.shape == values.shape
        assert np.array_equal(found, values)


@thorough
@given(values=st.lists(st.integers(-(2**64), 2**64), min_size=1, max_size=4))
@example([0])
@example([-1, 2**63 - 1, -(2**63 - 1)])
def test_integers_are_read_exactly_or_left_alone(values: list[int]) -> None:
    found = read_decimals(",".join(map(str, values)).encode(), are_integers=True)
    if max(map(abs, values)) < 2**63:
        assert found is not None
        assert found.dtype == np.int64
        assert found.tolist() == values
    else:
        assert found is None
    assert read_decimals(b"1,2.0", are_integers=True) is None
    assert read_decimals(b"1e2", are_integers=True) is None


def test_text_in_memory_that_may_be_written_is_read_by_the_same_kernel() -> None:
    text = b"xx1.5, 2]"
    for whole in (text, bytearray(text), memoryview(bytearray(text))):
        found = read_decimals(memoryview(whole)[2:-1])
        assert found is not None
        assert found.tolist() == [1.5, 2]


@pytest.fixture
def only_yielding_threads() -> Iterator[None]:
    """The interpreter is taken from no thread that does not let it go."""
    found = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(found)


@pytest.mark.usefixtures("only_yielding_threads")
def test_another_thread_runs_while_a_long_text_is_read() -> None:
    text = memoryview(b",".join([b"-1.2345678"] * 1_000_000))
    read_decimals(text)  # the first call compiles, which lets others run
    ticks, is_done = 0, False

    def tick() -> None:
        nonlocal ticks
        while not is_done:
            time.sleep(1e-4)
            ticks += 1

    def ticks_while_reading() -> int:
        before = ticks
        assert read_decimals(text) is not None
        return ticks - before

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        # a machine with much to do may run the other thread late: once is enough, and never happens where none can
        assert any(ticks_while_reading() > 2 for _ in range(50))
    finally:
        is_done = True
        ticker.join()
