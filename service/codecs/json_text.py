"""JSON text to values and back, with the bare tokens NaN, Infinity and -Infinity that RFC 8259 leaves out."""

import math
from collections.abc import Mapping
from typing import cast

import orjson
import pydantic_core

from service.engine.protocol import ParameterValue
from service.errors import PayloadMalformedError

_SHOWN_CHARACTERS = 60
_BARE = {
    "NaN": orjson.Fragment(b"NaN"),
    "Infinity": orjson.Fragment(b"Infinity"),
    "-Infinity": orjson.Fragment(b"-Infinity"),
}


class UnusualError(Exception):
    """Not seen outside of this package: the text has to be parsed as a whole. See json_pieces."""


def parse(text: bytearray | memoryview | bytes, *, field: str = "body") -> object:
    """Parse JSON; a second parser, which knows the bare tokens, runs only where the first met one."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not text:
            raise PayloadMalformedError(f"{field}: expected JSON, received nothing") from None
        copy = bytes(text)
        if b"NaN" not in copy and b"Infinity" not in copy:
            raise PayloadMalformedError(f"{field}: expected JSON: {error}") from None
    try:
        return pydantic_core.from_json(copy)
    except ValueError as error:
        raise PayloadMalformedError(f"{field}: expected JSON: {error}") from None


def parse_object(text: bytearray | memoryview | bytes, *, field: str = "body") -> dict[str, object]:
    """Parse JSON that has to be an object."""
    return expect_object(parse(text, field=field), field=field)


def expect_object(value: object, *, field: str) -> dict[str, object]:
    """Return the value if it is an object."""
    if type(value) is not dict:
        raise PayloadMalformedError(f"{field}: expected an object, received {describe(value)}")
    return cast("dict[str, object]", value)


def expect_list(value: object, *, field: str) -> list[object]:
    """Return the value if it is a list."""
    if type(value) is not list:
        raise PayloadMalformedError(f"{field}: expected a list, received {describe(value)}")
    return value


def expect_string(value: object, *, field: str) -> str:
    """Return the value if it is a string."""
    if type(value) is not str:
        raise PayloadMalformedError(f"{field}: expected a string, received {describe(value)}")
    return value


def expect_scalar(value: object, *, field: str) -> ParameterValue:
    """Return the value if it is a string, number, boolean or null."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise PayloadMalformedError(f"{field}: expected a string, number, boolean or null, received {describe(value)}")


def describe(value: object) -> str:
    """Say in a few characters what a JSON value is; nested values are counted, never printed."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]!r}..."
    if not isinstance(value, int | float):
        raise UnusualError
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."


def name_of(value: float) -> str:
    """Return the protocol's name of a number that is not finite."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def printable(value: object, *, are_tokens_bare: bool) -> object:
    """Return the value with numbers that are not finite as bare tokens or as strings; orjson would write null."""
    if isinstance(value, Mapping):
        return {str(key): printable(item, are_tokens_bare=are_tokens_bare) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item, are_tokens_bare=are_tokens_bare) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _BARE[name_of(value)] if are_tokens_bare else name_of(value)
    return value
