import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given

from service.codecs import npz
from service.codecs.body import TensorBody
from service.engine.protocol import Tensor
from service.errors import PayloadMalformedError, PayloadTooLargeError
from tests.service.codecs.strategies import assert_same_bits, named_arrays, thorough


def zipped(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return bytearray(file.getvalue())


def decode(body: bytes | bytearray, *names: str) -> TensorBody:
    return npz.decode(body, tensor_names=names, query_parameters={"eps": "1", "outputs": "mean"})


def saved(**tensors: Tensor) -> bytearray:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **tensors)
    return bytearray(file.getvalue())


@thorough
@given(outputs=named_arrays)
def test_round_trips_every_datatype_and_name(outputs: dict[str, Tensor]) -> None:
    body = decode(bytearray().join(npz.encode("m", outputs, {}).chunks), *outputs)
    assert list(body.tensors) == list(outputs)
    for name, array in outputs.items():
        assert_same_bits(body.tensors[name], array)


def test_reads_what_numpy_saves_as_views_on_the_body() -> None:
    body = saved(input=np.arange(4000.0), mask=np.array([True]))
    decoded = decode(body, "input", "mask")
    assert_same_bits(decoded.tensors["input"], np.arange(4000.0))
    assert_same_bits(decoded.tensors["mask"], np.array([True]))
    assert decoded.parameters == {"eps": "1"}
    assert decoded.outputs == ("mean",)
    data = np.frombuffer(body, np.uint8)
    assert any(np.shares_memory(tensor, data) for tensor in decoded.tensors.values())


def test_numpy_and_zipfile_load_what_is_written() -> None:
    outputs: dict[str, Tensor] = {
        "output": np.arange(3, dtype=np.float32),
        "é/mean": np.array(2.0),
        "none": np.zeros((0, 2)),
    }
    encoded = npz.encode("m", outputs, {"a": 1})
    file = io.BytesIO(b"".join(encoded.chunks))
    assert zipfile.ZipFile(file).testzip() is None
    file.seek(0)
    loaded = np.load(file)
    assert list(loaded) == list(outputs)
    for name, array in outputs.items():
        assert_same_bits(loaded[name], array)
    assert encoded.headers == {"Normserve-Diagnostics": '{"a":1}'}
    assert encoded.content_type == "application/x-npz"


def test_compressed_entries_are_refused_with_advice() -> None:
    file = io.BytesIO()
    np.savez_compressed(file, input=np.zeros(9))
    with pytest.raises(
        PayloadMalformedError, match=r"entry 'input': expected a stored entry, .* write with numpy.savez"
    ):
        decode(file.getvalue(), "input")


def patched(offset_in_directory: int, packed: bytes) -> bytearray:
    body = saved(input=np.ones(3))
    start = body.rfind(b"PK\x01\x02") + offset_in_directory
    body[start : start + len(packed)] = packed
    return body


def ending(**fields: int) -> bytearray:
    body = saved(input=np.ones(3))
    values = {
        "disk": 0,
        "start": 0,
        "here": 1,
        "count": 1,
        "size": 0,
        "offset": body.rfind(b"PK\x01\x02"),
        "note": 0,
    } | fields
    return body[:-22] + struct.pack("<4s4H2IH", b"PK\x05\x06", *values.values())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a .npz file .zip., received 0 bytes without a directory"),
        (b"PK\x05\x06", "without a directory"),
        (saved(input=np.ones(3))[:-1], "without a directory"),
        (zipped(("input", b"")), "entry 'input': expected a name that ends with .npy"),
        (zipped(("input.npy", b"")), "entry 'input': expected a .npy file"),
        (patched(8, b"\x01\x00"), "entry 'input': expected no encryption"),
        (patched(16, b"\0\0\0\0"), "entry 'input': expected the CRC-32 00000000, received"),
        (patched(20, b"\x01\0\0\0"), "entry 'input': expected one size under 4 GiB, received 1 and 152"),
        (patched(20, b"\xff" * 8), "entry 'input': expected one size under 4 GiB"),
        (patched(20, b"\xff\xff\0\0" * 2), "entry 'input': expected 65535 bytes, received"),
        (patched(42, b"\xff" * 4), "entry 'input': expected its local header at byte 4294967295"),
        (patched(42, b"\x01\0\0\0"), "entry 'input': expected its local header at byte 1"),
        (patched(46, b"\xff\xfe"), "expected names in UTF-8"),
        (ending(here=2, count=2), "zip directory: expected"),
        (ending(offset=0), "zip directory: expected b'PK.x01.x02', received b'PK.x03.x04'"),
        (ending(offset=2**32 - 2), "zip directory: expected 1 entries, the body ends before"),
        (ending(offset=2**32 - 1), "in one part and under 4 GiB"),
        (ending(disk=1), "in one part and under 4 GiB"),
    ],
)
def test_what_is_no_plain_archive_is_refused(body: bytes | bytearray, message: str) -> None:
    with pytest.raises(PayloadMalformedError, match=message):
        decode(body, "input")


def test_duplicates_and_unknown_tensors_are_refused() -> None:
    body = saved(input=np.ones(3), twice=np.ones(3))
    with pytest.raises(PayloadMalformedError, match="tensor 'twice': expected one of input"):
        decode(body, "input")
    with pytest.raises(PayloadMalformedError, match="entry 'input': expected once, received twice"):
        decode(body.replace(b"twice.npy", b"input.npy"), "input")


def test_too_many_entries_are_too_large() -> None:
    with pytest.raises(PayloadTooLargeError, match="expected at most 1024 entries, received 1025"):
        decode(ending(here=1025, count=1025), "input")
