"""Arrays of every datatype and shape, what it means that two are the same, and hostile bodies."""

import math
import random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from service.datatypes import BOOL, BYTES, DATATYPES, Datatype
from service.engine.protocol import Tensor

NUMERIC = tuple(datatype for datatype in DATATYPES if datatype is not BYTES)
thorough = settings(deadline=None, max_examples=150)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn, datatypes: tuple[Datatype, ...] = NUMERIC) -> Tensor:
    """Any bits at all, which includes NaN payloads, subnormals, infinities and -0."""
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(shapes)
    count = math.prod(shape)
    if datatype is BYTES:
        elements = np.empty(count, np.object_)
        elements[:] = draw(st.lists(st.binary(max_size=6), min_size=count, max_size=count))
        return elements.reshape(shape)
    bits = random.Random(draw(st.integers(0, 2**32))).randbytes(count * datatype.itemsize)
    if datatype is BOOL:
        bits = bytes(byte & 1 for byte in bits)
    array = np.frombuffer(bits, datatype.numpy).reshape(shape)
    if datatype.is_float and count and draw(st.booleans()):
        array = array.copy()
        array.reshape(-1)[draw(st.integers(0, count - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf, -0.0]))
    return array


named_arrays = st.dictionaries(st.text(min_size=1, max_size=8), arrays(), max_size=4)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.flags.c_contiguous
    assert actual.flags.aligned
    if expected.dtype == np.object_:
        assert actual.tolist() == expected.tolist()
    else:
        assert actual.tobytes() == expected.tobytes()


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but for the payload of NaN, which JSON cannot carry."""
    if expected.dtype.kind in "iub":
        return assert_same_bits(actual, expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    with np.errstate(invalid="ignore"):  # raised by signaling NaN
        is_nan = np.isnan(expected)
        assert np.array_equal(np.isnan(actual), is_nan)
    return assert_same_bits(np.where(is_nan, expected, actual), expected)


@st.composite
def mutations(draw: st.DrawFn, body: bytes) -> bytearray:
    """The body with a few bytes changed, cut out, repeated or appended."""
    mutated = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(mutated)))
        stop = min(start + draw(st.integers(0, 4)), len(mutated))
        mutated[start:stop] = draw(
            st.binary(max_size=6) | st.sampled_from([b"-", b"9" * 30, b"[" * 70, b"NaN", b'"', b"\xff" * 8])
        )
    return mutated
