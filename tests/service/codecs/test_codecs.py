"""What holds for every codec: the same answer in every encoding, and nothing but refusals for hostile bodies."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codecs import npy, oip
from service.codecs.body import Codec
from service.codecs.media import CODECS
from service.codecs.oip_binary import decode_raw
from service.engine.protocol import Tensor, TensorSpec
from service.errors import ServiceError
from tests.service.codecs.strategies import arrays, assert_same_bits, assert_same_numbers, mutations, thorough

TENSORS: dict[str, Tensor] = {
    "input": np.arange(6, dtype=np.float32).reshape(2, 3),
    "mask": np.array([True, False]),
    "weight": np.array([np.nan, 1e300]),
}
by_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def body_of(codec: Codec) -> bytes:
    outputs = {"output": TENSORS["input"]} if codec.ONLY_OUTPUT else TENSORS
    body = b"".join(codec.encode("m", outputs, {}).chunks)
    return json.dumps(json.loads(body)["outputs"]).encode() if codec.MEDIA_TYPE == "application/json" else body


def protocol_body(*, is_binary: bool) -> tuple[bytes, int | None]:
    texts: dict[str, Tensor] = TENSORS | {"text": np.array([b"ab", b""], np.object_)}
    encoded = oip.encode_response("m", "1", texts, wants_binary=is_binary)
    body = b"".join(encoded.chunks).replace(b'"outputs":', b'"inputs":')
    return body, encoded.json_length and encoded.json_length - 1


@thorough
@given(array=arrays())
def test_every_encoding_gives_the_same_tensor(array: Tensor) -> None:
    for codec in CODECS.values():
        if codec.ONLY_OUTPUT:
            decoded = npy.read(bytearray().join(codec.encode("m", {"output": array}, {}).chunks), field="x")
        else:
            body = bytearray().join(codec.encode("m", {"x": array}, {}).chunks)
            if codec.MEDIA_TYPE == "application/json":
                body = bytearray(json.dumps(json.loads(body)["outputs"]).encode())
            decoded = codec.decode(body, tensor_names={"x"}, query_parameters={}).tensors["x"]
        same = assert_same_numbers if codec.MEDIA_TYPE == "application/json" else assert_same_bits
        same(decoded, array)


@by_codec
def test_the_bodies_that_are_mutated_below_are_valid(codec: Codec) -> None:
    assert "input" in codec.decode(body_of(codec), tensor_names=TENSORS, query_parameters={}).tensors


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
def test_the_protocol_bodies_that_are_mutated_below_are_valid(is_binary: bool) -> None:
    assert len(oip.decode_request(*protocol_body(is_binary=is_binary)).inputs) == 4


def only_refuses(decode: Callable[[], object]) -> None:
    with suppress(ServiceError):
        decode()


@by_codec
@thorough
@given(data=st.data())
def test_hostile_bodies_are_only_refused(codec: Codec, data: st.DataObject) -> None:
    body = data.draw(mutations(body_of(codec)) | st.binary(max_size=200))
    only_refuses(lambda: codec.decode(body, tensor_names=TENSORS, query_parameters={}))


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
@thorough
@given(data=st.data())
def test_hostile_protocol_bodies_are_only_refused(is_binary: bool, data: st.DataObject) -> None:
    valid, json_length = protocol_body(is_binary=is_binary)
    body = data.draw(mutations(valid) | st.binary(max_size=200))
    header = data.draw(st.sampled_from([json_length, None, "0"]) | st.integers(-1, len(body) + 1).map(str))
    only_refuses(lambda: oip.decode_request(body, header))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["NaN", "FP32", 2**80]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["shape", "data", "k"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@thorough
@given(data=st.data())
def test_json_values_in_any_place_are_only_refused(data: st.DataObject) -> None:
    entry: dict[str, object] = {"name": "x", "datatype": "INT16", "shape": [2], "data": [1, 2]}
    document: dict[str, object] = {"inputs": [entry], "parameters": {}, "outputs": [{"name": "y", "parameters": {}}]}
    place = data.draw(st.sampled_from([entry, document]))
    place[data.draw(st.sampled_from([*place, "id", "parameters"]))] = data.draw(values)
    only_refuses(lambda: oip.decode_request(json.dumps(document).encode(), None))
    named = json.dumps({"input": entry | data.draw(st.dictionaries(st.sampled_from([*entry, "k"]), values))}).encode()
    only_refuses(lambda: CODECS["application/json"].decode(named, tensor_names=TENSORS, query_parameters={}))


@thorough
@given(
    body=st.binary(max_size=40),
    shape=st.lists(st.integers(-1, 3), max_size=3),
    name=st.sampled_from(["FP16", "BYTES", "BOOL"]),
)
def test_hostile_raw_bodies_are_only_refused(body: bytes, shape: list[int], name: str) -> None:
    only_refuses(lambda: decode_raw(bytearray(body), [TensorSpec("x", name, tuple(shape))]))


def huge_header(shape: str) -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': True, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        ("application/json", b'{"input":{"shape":[1000000,1000000],"datatype":"FP64","data":[1]}}'),
        ("application/json", b'{"input":' + b"[" * 900 + b"]" * 900 + b"}"),
        ("application/x-npy", huge_header("(1000000, 1000000)")),
        ("application/x-npy", huge_header("(999999999999999999,)")),
        ("application/vnd.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
        ("application/vnd.safetensors", (15_999_999).to_bytes(8, "little") + b"{}"),
        ("application/x-npz", b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 1024, 1024, 2**31, 0, 0)),
    ],
)
def test_nothing_is_allocated_for_what_a_body_only_claims(media_type: str, body: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ServiceError):
        CODECS[media_type].decode(body, tensor_names=TENSORS, query_parameters={})
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_a_decode_of_binary_tensors_copies_nothing() -> None:
    array = np.zeros(1_000_000)
    encoded = oip.encode_response("m", "1", {"input": array}, wants_binary=True)
    text = bytes(encoded.chunks[0]).replace(b'"outputs"', b'"inputs"')
    body = bytearray(text + b" " * (-len(text) % 8) + array.tobytes())
    tracemalloc.start()
    oip.decode_request(body, len(body) - array.nbytes)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000
