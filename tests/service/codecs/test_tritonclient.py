"""The protocol's own client, unmodified, is the judge: what it writes we read, and what we write it reads."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from service import datatypes
from service.codecs.oip import InferRequest, RequestedOutput, decode_request, encode_response
from service.datatypes import DATATYPES
from service.engine.protocol import Tensor
from tests.service.codecs.strategies import arrays, assert_same_bits, assert_same_numbers, thorough


def send(inputs: dict[str, Tensor], *, is_binary: bool, **options: Any) -> InferRequest:
    made = [InferInput(name, list(array.shape), datatypes.of(array).name) for name, array in inputs.items()]
    for entry, array in zip(made, inputs.values(), strict=True):
        entry.set_data_from_numpy(array, binary_data=is_binary)
    body, header_length = InferenceServerClient.generate_request_body(made, **options)
    return decode_request(bytearray(body), header_length)


def receive(outputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    encoded = encode_response("m", "1", outputs, **options)
    body = b"".join(encoded.chunks)
    result = InferenceServerClient.parse_response_body(body, header_length=encoded.json_length)
    return {name: result.as_numpy(name) for name in outputs}


@thorough
@given(inputs=st.dictionaries(st.text(min_size=1, max_size=5), arrays(DATATYPES), min_size=1, max_size=3))
def test_its_binary_requests_arrive_bit_for_bit(inputs: dict[str, Tensor]) -> None:
    request = send(inputs, is_binary=True)
    assert request.wants_binary
    assert list(request.inputs) == list(inputs)
    for name, array in inputs.items():
        assert_same_bits(request.inputs[name], array)


@thorough
@given(array=arrays(tuple(row for row in DATATYPES if row.name not in ("BF16", "BYTES"))))
def test_its_json_requests_arrive(array: Tensor) -> None:
    # it writes BF16 in binary only
    assert_same_numbers(send({"x": array}, is_binary=False).inputs["x"], array)


def test_its_json_strings_arrive() -> None:
    array = np.array([["a", "é"], ["", "\n"]], np.object_)
    assert send({"x": array}, is_binary=False).inputs["x"].tolist() == [[b"a", "é".encode()], [b"", b"\n"]]


def test_its_options_arrive() -> None:
    request = send(
        {"x": np.zeros(1, np.float32)},
        is_binary=True,
        request_id="r",
        outputs=[InferRequestedOutput("y"), InferRequestedOutput("z", binary_data=False)],
        priority=1,
        timeout=500,
        sequence_id=7,
        sequence_start=True,
        parameters={"eps": 1e-5, "training": True},
    )
    assert request.id == "r"
    assert request.outputs == (RequestedOutput("y", True), RequestedOutput("z", False))
    assert request.parameters == {
        "sequence_id": 7,
        "sequence_start": True,
        "sequence_end": False,
        "priority": 1,
        "timeout": 500,
        "eps": 1e-5,
        "training": True,
    }


@thorough
@given(outputs=st.dictionaries(st.text(min_size=1, max_size=5), arrays(DATATYPES), max_size=3))
def test_it_reads_our_binary_responses_bit_for_bit(outputs: dict[str, Tensor]) -> None:
    for name, array in receive(outputs, wants_binary=True).items():
        assert array.dtype == outputs[name].dtype
        assert array.shape == outputs[name].shape
        assert array.tolist() == outputs[name].tolist() or array.tobytes() == outputs[name].tobytes()


@thorough
@given(array=arrays())
def test_it_reads_our_json_responses(array: Tensor) -> None:
    assert_same_numbers(receive({"y": array})["y"], array)


@pytest.mark.parametrize("wants_binary", [True, False], ids=["binary", "json"])
def test_it_reads_our_strings(wants_binary: bool) -> None:
    array = np.array([b"a", "é".encode(), b""], np.object_)
    read = receive({"y": array}, wants_binary=wants_binary)["y"].tolist()
    assert [item.encode() if isinstance(item, str) else item for item in read] == array.tolist()


def test_it_reads_responses_with_both_forms() -> None:
    outputs: dict[str, Tensor] = {
        "a": np.arange(3, dtype=np.float32),
        "b": np.arange(2, dtype=np.int8),
        "c": np.ones((2, 2)),
    }
    requested = tuple(RequestedOutput(name, name != "b") for name in outputs)
    for name, array in receive(outputs, requested=requested).items():
        assert_same_bits(np.ascontiguousarray(array), outputs[name])
