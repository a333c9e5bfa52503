import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from service import datatypes
from service.codecs import safetensors as codec
from service.codecs.body import TensorBody
from service.engine.protocol import Tensor
from service.errors import NotAcceptableError, PayloadMalformedError, PayloadTooLargeError
from tests.service.codecs.strategies import assert_same_bits, named_arrays, thorough


def decode(body: bytes | bytearray | memoryview, *names: str) -> TensorBody:
    return codec.decode(body, tensor_names=names, query_parameters={"eps": "1", "outputs": "mean"})


def a_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def an_entry(begin: Any = 0, end: Any = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@thorough
@given(outputs=named_arrays, offset=st.integers(0, 9))
def test_round_trips_every_datatype_at_every_offset(outputs: dict[str, Tensor], offset: int) -> None:
    body = bytearray(offset).join((b"", b"".join(codec.encode("m", outputs, {}).chunks)))
    decoded = decode(memoryview(body)[offset:], *outputs)
    assert decoded.tensors.keys() == outputs.keys()
    for name, array in outputs.items():
        assert_same_bits(decoded.tensors[name], array)


@thorough
@given(tensors=named_arrays)
def test_reads_what_the_library_writes(tensors: dict[str, Tensor]) -> None:
    decoded = decode(bytearray(safetensors.numpy.save(tensors, metadata={"a": "b"})), *tensors)
    for name, array in tensors.items():
        assert_same_bits(decoded.tensors[name], array)


@thorough
@given(outputs=named_arrays)
def test_the_library_reads_what_is_written(outputs: dict[str, Tensor]) -> None:
    # safetensors.numpy.load knows no BF16
    body = b"".join(codec.encode("m", outputs, {}).chunks)
    loaded = dict(safetensors.deserialize(body))  # type: ignore[no-untyped-call]  # a native function
    assert loaded.keys() == outputs.keys()
    for name, array in outputs.items():
        assert loaded[name]["dtype"] == datatypes.of(array).safetensors
        assert loaded[name]["shape"] == list(array.shape)
        assert bytes(loaded[name]["data"]) == array.tobytes()


def test_tensors_are_aligned_views_and_parameters_come_from_the_query() -> None:
    outputs: dict[str, Tensor] = {
        "input": np.ones(3, ml_dtypes.bfloat16),
        "mask": np.array([True]),
        "weight": np.ones(2),
    }
    body = bytearray().join(codec.encode("m", outputs, {}).chunks)
    decoded = decode(body, *outputs)
    assert all(np.shares_memory(tensor, np.frombuffer(body, np.uint8)) for tensor in decoded.tensors.values())
    assert decoded.parameters == {"eps": "1"}
    assert decoded.outputs == ("mean",)


def test_method_and_diagnostics_are_metadata() -> None:
    encoded = codec.encode("batch_norm", {}, {"drift": float("nan")})
    header = json.loads(b"".join(encoded.chunks)[8:])
    assert header["__metadata__"] == {"method": "batch_norm", "diagnostics": '{"drift":"NaN"}'}
    assert encoded.content_type == "application/vnd.safetensors"
    assert encoded.headers == {}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a safetensors file, received 0 bytes"),
        (a_file({}, length=9), "safetensors header: expected 9 bytes, received 10 in all"),
        (a_file(b"\xff"), "safetensors header: expected JSON"),
        (a_file(b"[1"), "safetensors header: expected JSON"),
        (a_file(b"[" * 100_000), "safetensors header: expected JSON"),
        (a_file(b"9" * 5000), "safetensors header: expected JSON"),
        (a_file([]), "safetensors header: expected an object, received a list of 0"),
        (a_file(b'{"x":1,"x":2}'), "a key is given twice"),
        (a_file(b'{"x":{"dtype":"F32","dtype":"I32"}}'), "a key is given twice"),
        (a_file({"x": 1}), "tensor 'x': expected an object, received 1"),
        (
            a_file({"x": an_entry(dtype="F8_E4M3")}),
            "tensor 'x'.dtype: expected one of BOOL, U8, .*, received 'F8_E4M3'",
        ),
        (a_file({"x": an_entry(dtype=[])}), "tensor 'x'.dtype: expected one of .*, received a list of 0"),
        (a_file({"x": an_entry(shape=[-1])}), "tensor 'x'.shape: expected non-negative integers, received -1"),
        (a_file({"x": an_entry(shape=7)}), "tensor 'x'.shape: expected a list"),
        (a_file({"x": an_entry(shape=[2**40, 2**40])}), "tensor 'x'.shape: expected at most"),
        (a_file({"x": an_entry(0.0)}), "tensor 'x'.data_offsets: expected two integers"),
        (a_file({"x": an_entry(4, 0)}), "tensor 'x'.data_offsets: expected 0 <= begin <= end, received 4 and 0"),
        (a_file({"x": an_entry(-4, 0)}), "tensor 'x'.data_offsets: expected 0 <= begin"),
        (a_file({"x": an_entry(0, 5)}, bytes(5)), r"tensor 'x': expected 4 bytes for F.32 of shape \[1\], received 5"),
        (a_file({"x": an_entry()}, bytes(3)), "tensor 'x': expected 4 bytes of data, received 3 in all"),
        (a_file({"x": an_entry()}, bytes(5)), "safetensors data: expected 4 bytes, received 5"),
        (a_file({"x": an_entry(4, 8)}, bytes(8)), "to begin at byte 0, received 4"),
        (a_file({"x": an_entry(), "y": an_entry(8, 12)}, bytes(12)), "to begin at byte 4, received 8"),
        (a_file({"x": an_entry(), "y": an_entry()}, bytes(4)), "to begin at byte 4, received 0"),
        (a_file({"x": an_entry(dtype="BOOL", shape=[4])}, b"\3" * 4), "tensor 'x': expected BOOL bytes of 0 and 1"),
        (a_file({"z": an_entry()}, bytes(4)), "tensor 'z': expected one of x, y"),
    ],
)
def test_what_is_no_plain_file_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(PayloadMalformedError, match=message):
        decode(bytearray(body), "x", "y")


def test_a_long_header_is_too_large() -> None:
    with pytest.raises(PayloadTooLargeError, match="expected at most 16000000 bytes, received a length of 16000001"):
        decode(a_file({}, length=16_000_001), "x")


def test_strings_do_not_fit() -> None:
    with pytest.raises(NotAcceptableError, match="holds no BYTES tensor, received output 'y'"):
        codec.encode("m", {"y": np.array([b"a"], np.object_)}, {})
