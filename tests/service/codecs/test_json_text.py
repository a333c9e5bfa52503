import math

import orjson
import pytest

from service.codecs import json_text
from service.errors import PayloadMalformedError


@pytest.mark.parametrize(
    "text", [b"[1,NaN]", bytearray(b"[1,NaN]"), memoryview(b"[1,NaN]")], ids=["bytes", "bytearray", "view"]
)
def test_parse_reads_bare_tokens_in_any_buffer(text: bytes | bytearray | memoryview) -> None:
    parsed = json_text.parse(text)
    assert isinstance(parsed, list)
    assert parsed[0] == 1
    assert math.isnan(parsed[1])


def test_parse_keeps_token_like_strings_as_strings() -> None:
    assert json_text.parse(b'["NaN", -Infinity, "Infinity"]') == ["NaN", -math.inf, "Infinity"]


@pytest.mark.parametrize("value", [2**64 - 1, -(2**63), 2**53 + 1])
def test_parse_keeps_integers_exact_with_and_without_tokens(value: int) -> None:
    assert json_text.parse(f"[{value}]".encode()) == [value]
    assert json_text.parse(f"[{value},Infinity]".encode()) == [value, math.inf]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1,]",
        b'"\xff"',
        b"nan",
        b"[NaN",
        b"[NaNs]",
        b"1e400",
        b"[" * 5000,
        b"[NaN," + b"[" * 5000,
        b'"\\ud800"',
        b"[NaN," + b"9" * 5000 + b"]",
    ],
    ids=lambda text: repr(text[:8]),
)
def test_parse_refuses_what_is_not_json(text: bytes) -> None:
    with pytest.raises(PayloadMalformedError, match="body: expected JSON"):
        json_text.parse(text)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[[]]], "a list of 1"),
        ({"a": 1}, "an object of 1"),
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (1.5, "1.5"),
        ("short", "'short'"),
        ("x" * 1000, f"'{'x' * 60}'..."),
        (10**100, f"1{'0' * 59}..."),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_describe_is_short(value: object, words: str) -> None:
    assert json_text.describe(value) == words


def test_describe_does_not_walk_deep_lists() -> None:
    assert json_text.describe(json_text.parse(b"[" * 1000 + b"]" * 1000)) == "a list of 1"


@pytest.mark.parametrize(
    ("are_tokens_bare", "text"),
    [
        (True, b'{"a":[NaN,Infinity,{"b":-Infinity}],"c":1.0,"d":"NaN"}'),
        (False, b'{"a":["NaN","Infinity",{"b":"-Infinity"}],"c":1.0,"d":"NaN"}'),
    ],
    ids=["bare", "quoted"],
)
def test_printable_names_numbers_that_are_not_finite(are_tokens_bare: bool, text: bytes) -> None:
    value = {"a": (math.nan, math.inf, {"b": -math.inf}), "c": 1.0, "d": "NaN"}
    assert orjson.dumps(json_text.printable(value, are_tokens_bare=are_tokens_bare)) == text


@pytest.mark.parametrize(
    "check", [json_text.expect_object, json_text.expect_list, json_text.expect_string, json_text.expect_scalar]
)
def test_expectations_name_the_field_and_what_came(check: object) -> None:
    wrong: object = {} if check is json_text.expect_scalar else None
    with pytest.raises(PayloadMalformedError, match=r"place: expected an? .*, received (null|an object of 0)"):
        check(wrong, field="place")  # type: ignore[operator]  # a function, parametrized
