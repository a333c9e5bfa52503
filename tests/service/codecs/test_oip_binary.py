import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import datatypes
from service.codecs import oip_binary
from service.datatypes import DATATYPES
from service.engine.protocol import Tensor, TensorSpec
from service.errors import PayloadMalformedError
from tests.service.codecs.strategies import arrays, assert_same_bits, thorough


@thorough
@given(array=arrays(DATATYPES), prefix=st.binary(max_size=9), suffix=st.binary(max_size=3))
def test_every_datatype_round_trips_at_every_offset(array: Tensor, prefix: bytes, suffix: bytes) -> None:
    encoded = bytes(oip_binary.encode(array))
    body = bytearray(prefix + encoded + suffix)
    decoded = oip_binary.cut(body, len(prefix), len(encoded), datatypes.of(array), array.shape, field="x")
    assert_same_bits(decoded, array)


def test_large_contiguous_arrays_are_not_copied_on_the_way_out() -> None:
    array = np.arange(5000, dtype=np.float64)
    assert np.shares_memory(np.frombuffer(oip_binary.encode(array), np.uint8), array)
    assert bytes(oip_binary.encode(array[::-1])) == array[::-1].tobytes()


@pytest.mark.parametrize(
    ("shape", "count", "found"),
    [
        ((2, 3), 6, (2, 3)),
        ((-1, 3), 3, (1, 3)),
        ((-1, 3), 6, (2, 3)),
        ((-1, 3), 0, (0, 3)),
        ((2, -1), 6, (2, 3)),
        ((-1, 2, -1), 6, (1, 2, 3)),
        ((-1, -1), 6, (1, 6)),
        ((), 1, ()),
    ],
    ids=str,
)
def test_raw_bodies_take_the_shape_of_the_spec(shape: tuple[int, ...], count: int, found: tuple[int, ...]) -> None:
    values = np.arange(count, dtype=np.float32)
    inputs = oip_binary.decode_raw(bytearray(values.tobytes()), [TensorSpec("x", "FP32", shape)])
    assert list(inputs) == ["x"]
    assert_same_bits(inputs["x"], values.reshape(found))


def test_raw_strings_are_counted_by_their_lengths() -> None:
    values = np.array([b"a", b"", b"bcd"], np.object_)
    inputs = oip_binary.decode_raw(oip_binary.encode(values), [TensorSpec("x", "BYTES", (-1,))])
    assert_same_bits(inputs["x"], values)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 3), 20, r"expected the elements of shape \[2, 3\], received 5 elements"),
        ((-1, 3), 20, r"expected the elements of shape \[-1, 3\], received 5 elements"),
        ((-1, 3), 22, "expected a multiple of 4 bytes for FP32, received 22"),
        ((-1, -1, -1), 24, "more than one free axis"),
        ((2, -1, -1), 24, "more than one free axis"),
        ((-1, 0), 4, "received 1 elements"),
        ((-1, 0), 0, r"expected the elements of shape \[-1, 0\]"),
    ],
    ids=str,
)
def test_raw_bodies_that_do_not_fit_are_refused(shape: tuple[int, ...], size: int, message: str) -> None:
    with pytest.raises(PayloadMalformedError, match=f"raw binary input 'x': .*{message}"):
        oip_binary.decode_raw(bytearray(size), [TensorSpec("x", "FP32", shape)])


@pytest.mark.parametrize("count", [0, 2])
def test_raw_bodies_need_a_model_with_one_input(count: int) -> None:
    with pytest.raises(PayloadMalformedError, match=f"expected a model with one input, this one has {count}"):
        oip_binary.decode_raw(bytearray(4), [TensorSpec("x", "FP32", (1,))] * count)
