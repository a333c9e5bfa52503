"""Decimal numbers in text to binary, without the interpreter: other threads go on meanwhile.

A number w * 10^q is exact where w and 10^|q| are, so that one multiplication or division rounds it. Else 5^q is taken
from a table, rounded down to 128 bits, and the product is known to lie within a few units of its 128 leading bits: a
double that both ends of this interval round to is the nearest one. What is binary itself or half-way between doubles
divides evenly. Nothing is guessed: a text with a number that stays open, is too large, or has more than 19 digits is
left to the caller's own parser, as is whatever else is unusual.

This module imports numba, which takes its time, and its first call compiles.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from normcore._compiled import compiled, inlined
from normcore._values import bits_of, byte_at

_MAX_RANK = 64
_MAX_DIGITS = 19  # that a word of 64 bits holds, whatever they are
_MAX_EXPONENT = 1000
_LEAST_POWER, _LARGEST_POWER = -342, 308
_EXACT_POWER = 22  # of ten, in float64
_EXACT_FIVE = 27  # the power of five that a word holds
_EXACT_INTEGER = np.uint64(2**53)
_INFINITY = np.uint64(0x7FF << 52)
_SIGN = np.uint64(1 << 63)
_NONE, _ONE, _TEN = np.uint64(0), np.uint64(1), np.uint64(10)
_ALL, _LOW, _HALF_WORD = np.uint64(2**64 - 1), np.uint64(2**32 - 1), np.uint64(32)
_TOP, _MANTISSA_BITS = np.uint64(63), np.uint64(52)
_UNCERTAIN = np.uint64(2**64 - 4)
_ZERO, _POINT, _MINUS, _PLUS, _COMMA, _OPEN, _CLOSE = b"0.-+,[]"
_SMALL_E, _CAPITAL_E = b"eE"
_SPACE, _TAB, _LINE_FEED, _RETURN = b" \t\n\r"


def read_decimals(text: bytes | bytearray | memoryview, *, are_integers: bool = False) -> NDArray[Any] | None:
    """The array whose elements, numbers or equally nested lists of them, stand in JSON between commas.

    Args:
        text: what stands between the outermost brackets.
        are_integers: read int64, and refuse a fraction or an exponent; else read float64.

    Returns:
        The elements, each the nearest to its text, ties to even; -0 without a fraction or exponent is 0. None where the
        text is anything else, and where it has to be read by other means; see above.

    >>> read_decimals(b"[1.5, 2], [-3e2, 0.1]")
    array([[ 1.5e+00,  2.0e+00],
           [-3.0e+02,  1.0e-01]])
    >>> read_decimals(b"1, null") is None
    True
    """
    codes = np.frombuffer(text, np.uint8)
    codes.flags.writeable = False  # else the kernel would be compiled for both kinds
    values = np.empty(len(codes) // 2 + 1)
    sizes = np.zeros(_MAX_RANK, np.int64)
    count = _read(
        codes.ctypes.data, codes.ctypes.data + len(codes), values, values.view(np.uint64), sizes, are_integers
    )
    if count < 0:
        return None
    found = values[:count].view(np.int64) if are_integers else values[:count]
    return found.reshape(sizes[: int(np.argmin(sizes))])


def _tables() -> tuple[NDArray[Any], NDArray[Any]]:
    """Powers of five in 128 bits, the larger half first; binary exponents of products with them."""
    powers, exponents = [], []
    for power in range(_LEAST_POWER, _LARGEST_POWER + 1):
        five = 5 ** abs(power)
        length = five.bit_length()
        shift = length - 128 if power >= 0 else -(127 + length)
        digits = five << 128 >> length if power >= 0 else (1 << -shift) // five
        powers.append((digits >> 64, digits % 2**64))
        exponents.append(128 + power + shift)
    return np.array(powers, np.uint64), np.array(exponents, np.int64)


_TENS = np.array([float(10**power) for power in range(_EXACT_POWER + 1)])
_FIVES = np.array([5**power for power in range(_EXACT_FIVE + 1)], np.uint64)
_TABLE, _EXPONENTS = _tables()


@compiled
def _read(place: int, stop: int, values: Any, bits: Any, sizes: Any, are_integers: bool) -> int:
    """The number of elements between two addresses, or -1. `sizes` become those of the axes, and 0 behind the last."""
    count, depth, leaves = 0, 0, -1
    counts = np.zeros_like(sizes)
    while True:
        place, depth = _open(stop, place, depth)
        leaves = depth if leaves < 0 else leaves
        if depth != leaves or depth >= sizes.size - 1:
            return -1
        place, mantissa, exponent, is_negative, is_integer = _read_number(stop, place)
        is_read, number = _convert(mantissa, exponent, is_negative, is_integer, are_integers)
        if place < 0 or not is_read:
            return -1
        bits[count] = number
        count += 1
        counts[depth] += 1
        place = _skip_space(stop, place)
        if place < stop and byte_at(place) == _CLOSE:
            place, depth = _close(stop, place, depth, counts, sizes)
        if place == stop:
            sizes[0] = counts[0]
            return -1 if depth else count
        if depth < 0 or byte_at(place) != _COMMA:
            return -1
        place += 1


@inlined
def _open(stop: Any, place: Any, depth: Any) -> Any:
    """Where the next element begins, and how deep it lies."""
    place = _skip_space(stop, place)
    while place < stop and byte_at(place) == _OPEN:
        depth += 1
        place = _skip_space(stop, place + 1)
    return place, depth


@inlined
def _close(stop: Any, place: Any, depth: Any, counts: Any, sizes: Any) -> Any:
    """The same behind lists that end; the depth is negative where one does not begin, or is not as long as another."""
    while place < stop and byte_at(place) == _CLOSE:
        if depth <= 0 or (sizes[depth] and sizes[depth] != counts[depth]):
            return place, -1
        sizes[depth], counts[depth] = counts[depth], 0
        depth -= 1
        counts[depth] += 1
        place = _skip_space(stop, place + 1)
    return place, depth


@inlined
def _skip_space(stop: Any, place: Any) -> Any:
    while place < stop:
        code = byte_at(place)
        if code != _SPACE and code != _LINE_FEED and code != _TAB and code != _RETURN:
            break
        place += 1
    return place


@inlined
def _read_number(stop: Any, place: Any) -> Any:
    """Where it ends, or -1; digits without point, power of ten, whether it is negative, and has digits alone."""
    is_negative = place < stop and byte_at(place) == _MINUS
    first = place + 1 if is_negative else place
    place, mantissa = _read_digits(stop, first, _NONE)
    length = place - first
    is_failed = length == 0 or (length > 1 and byte_at(first) == _ZERO)
    exponent: Any = 0
    is_integer = True
    if place < stop and byte_at(place) == _POINT:
        start = place + 1
        place, mantissa = _read_digits(stop, start, mantissa)
        is_integer, exponent = False, start - place
        is_failed |= start == place
        length -= exponent
    if length > _MAX_DIGITS:
        while first < place and (byte_at(first) == _ZERO or byte_at(first) == _POINT):
            length -= byte_at(first) == _ZERO
            first += 1
        is_failed |= length > _MAX_DIGITS
    if place < stop and (byte_at(place) == _SMALL_E or byte_at(place) == _CAPITAL_E):
        place += 1
        is_small = place < stop and byte_at(place) == _MINUS
        place += is_small or (place < stop and byte_at(place) == _PLUS)
        start = place
        place, power = _read_digits(stop, start, _NONE)
        is_integer = False
        is_failed |= start == place or place - start > _MAX_DIGITS or power > np.uint64(_MAX_EXPONENT)
        exponent += -np.int64(power) if is_small else np.int64(power)
    return -1 if is_failed else place, mantissa, exponent, is_negative, is_integer


@inlined
def _read_digits(stop: Any, place: Any, number: Any) -> Any:
    """Where they end, and the number with them appended."""
    while place < stop:
        digit = np.uint64(byte_at(place)) - np.uint64(_ZERO)
        if digit >= _TEN:
            break
        number = number * _TEN + digit
        place += 1
    return place, number


@inlined
def _convert(mantissa: Any, exponent: Any, is_negative: Any, is_integer: Any, are_integers: Any) -> Any:
    """Whether it could be, and the bits."""
    if are_integers:
        return is_integer and not mantissa >> _TOP, _NONE - mantissa if is_negative else mantissa
    found = _nearest(mantissa, exponent)
    has_sign = is_negative and not (is_integer and mantissa == _NONE)
    return found < _INFINITY, found | _SIGN if has_sign else found


@inlined
def _nearest(mantissa: Any, exponent: Any) -> Any:
    """The bits of the double nearest to mantissa * 10^exponent; of no finite one where that stays open."""
    if mantissa == _NONE:
        return _NONE
    if mantissa <= _EXACT_INTEGER and -_EXACT_POWER <= exponent <= _EXACT_POWER:
        value = np.float64(mantissa)
        value = value / _TENS[-exponent] if exponent < 0 else value * _TENS[exponent]
        return bits_of(value)
    if exponent < _LEAST_POWER or exponent > _LARGEST_POWER:
        return _ALL
    row = exponent - _LEAST_POWER
    is_exact = 0 <= exponent <= _EXACT_FIVE
    found = _round(mantissa, _TABLE[row, 0], _TABLE[row, 1], _EXPONENTS[row], is_exact)
    if found == _ALL and -_EXACT_FIVE <= exponent < 0:
        five = _FIVES[-exponent]
        if mantissa % five == _NONE:  # a binary number itself, or half-way between two
            found = bits_of(np.float64(mantissa // five) / np.float64(_ONE << np.uint64(-exponent)))
    return found


@inlined
def _round(mantissa: Any, high: Any, low: Any, exponent: Any, is_exact: Any) -> Any:
    """The bits of the double nearest to the product; all of them set where it stays open."""
    while not mantissa >> _TOP:
        mantissa <<= _ONE
        exponent -= 1
    leading, following = _multiply(mantissa, high)
    carried = following + _multiply(mantissa, low)[0]
    leading += _ONE if carried < following else _NONE
    following = carried
    if not leading >> _TOP:
        leading = (leading << _ONE) | (following >> _TOP)
        following <<= _ONE
        exponent -= 1
    biased = exponent + 63 + 1023
    dropped = 11 if biased > 0 else 12 - biased
    if dropped > 63 or following >= _UNCERTAIN:
        return _ALL
    kept = leading >> np.uint64(dropped)
    rest, half = leading - (kept << np.uint64(dropped)), _ONE << np.uint64(dropped - 1)
    if rest == half and following == _NONE:
        if not is_exact:
            return _ALL
        kept += kept & _ONE
    elif rest >= half:
        kept += _ONE
    # the leading bit, where there is one, and a carry into it raise the exponent
    return kept + (np.uint64(max(biased, 1) - 1) << _MANTISSA_BITS)


@inlined
def _multiply(one: Any, other: Any) -> Any:
    """Both words of a product, the larger half first."""
    one_high, one_low = one >> _HALF_WORD, one & _LOW
    other_high, other_low = other >> _HALF_WORD, other & _LOW
    lowest, highest = one_low * other_low, one_high * other_high
    crossed, straight = one_high * other_low, one_low * other_high
    middle = (lowest >> _HALF_WORD) + (crossed & _LOW) + straight
    return highest + (crossed >> _HALF_WORD) + (middle >> _HALF_WORD), one * other
