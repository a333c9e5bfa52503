import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as numpy_format

from service.codecs import npy
from service.engine.protocol import Tensor
from service.errors import NotAcceptableError, PayloadMalformedError, PayloadTooLargeError
from tests.service.codecs.strategies import arrays, assert_same_bits, thorough


def saved(array: Tensor, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    numpy_format.write_array(file, array, version=version)
    return file.getvalue()


def a_file(header: str, data: bytes = b"\0" * 8) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin-1") + data


@thorough
@given(array=arrays(), version=st.sampled_from([(1, 0), (2, 0)]), is_fortran=st.booleans(), is_big_endian=st.booleans())
def test_reads_what_numpy_saves(array: Tensor, version: tuple[int, int], is_fortran: bool, is_big_endian: bool) -> None:
    stored = np.asfortranarray(array) if is_fortran else array
    if is_big_endian and array.dtype.kind in "iuf":
        stored = stored.astype(stored.dtype.newbyteorder(">"))
    assert_same_bits(npy.read(bytearray(saved(stored.reshape(array.shape), version)), field="x"), array)


@thorough
@given(array=arrays())
def test_numpy_loads_what_is_written(array: Tensor) -> None:
    loaded = np.load(io.BytesIO(b"".join(npy.write(array))))
    assert_same_bits(loaded.view(array.dtype) if loaded.dtype.kind == "V" else loaded, array)


@thorough
@given(array=arrays(), offset=st.integers(0, 9))
def test_round_trips_at_every_offset(array: Tensor, offset: int) -> None:
    body = bytearray(offset) + b"".join(npy.write(array))
    assert_same_bits(npy.read(memoryview(body)[offset:], field="x"), array)


def test_arrays_are_views_on_the_body() -> None:
    body = bytearray(saved(np.arange(1000.0)))
    assert np.shares_memory(npy.read(body, field="x"), np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }          \n",
        "{'shape':(2,),'fortran_order':False,'descr':'f4'}",
        '{"descr": "<f4", "fortran_order": False, "shape": (2, )}\n',
    ],
)
def test_reads_headers_of_other_writers(header: str) -> None:
    data = np.array([1, 2], np.float32)
    assert_same_bits(npy.read(a_file(header, data.tobytes()), field="x"), data)


def test_format_3_is_read() -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (), }"
    body = b"\x93NUMPY\x03\x00" + len(header).to_bytes(4, "little") + header + np.float64(7).tobytes()
    assert npy.read(body, field="x").tolist() == 7


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a .npy file with a whole header, received 0 bytes"),
        (b"PK\x03\x04" * 9, "expected a .npy file of format 1, 2 or 3"),
        (b"\x93NUMPY\x04\x00" + bytes(90), "expected a .npy file of format 1, 2 or 3"),
        (b"\x93NUMPY\x01\x00\x10\x00{", "expected a .npy file with a whole header, received 11 bytes"),
        (b"\x93NUMPY\x01\x00", "expected a .npy file with a whole header"),
        (
            a_file("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"),
            r"expected 12 bytes for FP32 of shape \[3\], received 8",
        ),
        (a_file("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"), "expected 4 bytes .* received 8"),
        (
            a_file("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
            "received '|O'; objects and pickles are not read",
        ),
        (
            a_file("{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }"),
            "expected a descr of b1, u1, .*, received '<c8'",
        ),
        (a_file("{'descr': '<V4', 'fortran_order': False, 'shape': (2,), }"), "received '<V4'"),
        (a_file("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }"), "structured types are not read"),
        (
            a_file("{'descr': '<f4', 'fortran_order': 0, 'shape': (2,), }"),
            "expected a .npy header with one plain descr",
        ),
        (a_file("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }"), "expected a .npy header with one plain"),
        (a_file("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}"), "expected a .npy header with"),
        (a_file("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"), "expected a .npy header"),
        (a_file("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}; x"), "expected a .npy header with"),
        (a_file("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 65 + ")}"), "at most 64 axes"),
        (a_file("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999999, 0)}"), "at most .* elements"),
        (
            a_file("{'descr': '|b1', 'fortran_order': False, 'shape': (8,)}", b"\2" * 8),
            "expected BOOL bytes of 0 and 1",
        ),
    ],
)
def test_what_is_no_plain_array_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(PayloadMalformedError, match=f"body.*: .*{message.replace('|', '[|]')}"):
        npy.decode(bytearray(body), tensor_names={"input"}, query_parameters={})


def test_a_pickle_is_refused() -> None:
    with pytest.raises(PayloadMalformedError, match="objects and pickles are not read"):
        npy.read(saved(np.array([{}], np.object_)), field="x")


@pytest.mark.parametrize("length_bytes", [2, 4])
def test_a_long_header_is_too_large(length_bytes: int) -> None:
    version = b"\x01\x00" if length_bytes == 2 else b"\x02\x00"
    with pytest.raises(PayloadTooLargeError, match=r"expected a \.npy header up to 10000 bytes"):
        npy.read(b"\x93NUMPY" + version + b"\xff" * length_bytes, field="x")


def test_a_request_is_the_tensor_input_and_the_query() -> None:
    query = {"eps": "1e-3", "outputs": "output, mean,"}
    body = npy.decode(saved(np.ones(2)), tensor_names={"input", "weight"}, query_parameters=query)
    assert body.tensors.keys() == {"input"}
    assert body.parameters == {"eps": "1e-3"}
    assert body.outputs == ("output", "mean")
    assert npy.decode(saved(np.ones(2)), tensor_names={"input"}, query_parameters={}).outputs is None


def test_a_method_without_input_takes_no_npy() -> None:
    with pytest.raises(PayloadMalformedError, match="tensor 'input': expected one of mean"):
        npy.decode(saved(np.ones(2)), tensor_names={"mean"}, query_parameters={})


def test_a_response_is_the_tensor_output_and_a_header() -> None:
    encoded = npy.encode("m", {"output": np.ones(2)}, {"drift": float("inf"), "name": "é\n"})
    assert encoded.content_type == "application/x-npy"
    text = encoded.headers["Normserve-Diagnostics"]
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text) == {"drift": "Infinity", "name": "é\n"}
    assert npy.encode("m", {"output": np.ones(2)}, {}).headers == {}


@pytest.mark.parametrize("names", [[], ["mean"], ["output", "mean"]], ids=str)
def test_other_outputs_do_not_fit(names: list[str]) -> None:
    with pytest.raises(NotAcceptableError, match="select outputs=output or accept application/x-npz"):
        npy.encode("m", dict.fromkeys(names, np.ones(2)), {})


def test_strings_do_not_fit() -> None:
    with pytest.raises(NotAcceptableError, match="holds no BYTES tensor"):
        npy.encode("m", {"output": np.array([b"a"], np.object_)}, {})
