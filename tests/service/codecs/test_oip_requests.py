import json
from typing import Any

import numpy as np
import pytest

from service.codecs.oip import InferRequest, RequestedOutput, decode_request
from service.errors import PayloadMalformedError, UnsupportedError

Json = dict[str, Any]
TWO = np.array([1.5, -2], np.float32).tobytes()


def an_input(**fields: object) -> Json:
    return {"name": "x", "datatype": "FP32", "shape": [2], "data": [1.5, -2]} | fields


def a_binary_input(size: object = 8, **fields: object) -> Json:
    entry = an_input(parameters={"binary_data_size": size}) | fields
    del entry["data"]
    return entry


def decode(*inputs: object, tail: bytes = b"", **fields: object) -> InferRequest:
    text = json.dumps({"inputs": list(inputs)} | fields).encode()
    return decode_request(bytearray(text + tail), len(text) if tail else None)


def test_a_request_carries_id_parameters_and_outputs() -> None:
    request = decode(
        an_input(parameters={"content_type": "np"}),
        id="7",
        model_name="ignored",
        parameters={"eps": 1e-3, "training": True, "name": "a", "steps": 3, "momentum": None},
        outputs=[{"name": "y"}, {"name": "z", "parameters": {"binary_data": True, "k": 1}}],
    )
    assert request.id == "7"
    assert request.parameters == {"eps": 1e-3, "training": True, "name": "a", "steps": 3, "momentum": None}
    assert request.outputs == (RequestedOutput("y", False), RequestedOutput("z", True))
    assert not request.wants_binary
    assert request.raw is None
    assert request.inputs["x"].tolist() == [1.5, -2]


@pytest.mark.parametrize(
    "fields", [{}, {"id": None, "parameters": None, "outputs": None}, {"id": "", "outputs": []}], ids=repr
)
def test_optional_fields_may_be_missing_null_or_empty(fields: Json) -> None:
    request = decode(an_input(), **fields)
    assert (request.id, request.parameters, request.outputs) == ("", {}, ())


def test_binary_data_output_is_the_default_of_every_output_and_no_parameter() -> None:
    request = decode(
        an_input(),
        parameters={"binary_data_output": True},
        outputs=[{"name": "y"}, {"name": "z", "parameters": {"binary_data": False}}],
    )
    assert request.parameters == {}
    assert request.wants_binary
    assert [output.is_binary for output in request.outputs] == [True, False]


def test_binary_inputs_lie_behind_the_json_in_order_and_json_inputs_between() -> None:
    inputs = [a_binary_input(), an_input(name="j"), a_binary_input(3, name="b", datatype="BOOL", shape=[3, 1])]
    request = decode(*inputs, tail=TWO + b"\x01\x00\x01")
    assert list(request.inputs) == ["x", "j", "b"]
    assert request.inputs["x"].tolist() == [1.5, -2]
    assert request.inputs["b"].tolist() == [[True], [False], [True]]


@pytest.mark.parametrize("padding", range(4))
def test_binary_inputs_share_the_body_where_aligned(padding: int) -> None:
    text = json.dumps({"inputs": [a_binary_input()]}).encode()
    text += b" " * (-len(text) % 4 + padding)
    body = bytearray(text + TWO)
    tensor = decode_request(body, str(len(text))).inputs["x"]
    assert tensor.flags.aligned
    assert tensor.flags.writeable
    assert np.shares_memory(tensor, np.frombuffer(body, np.uint8)) == (padding == 0)
    assert tensor.tolist() == [1.5, -2]


def test_a_memoryview_of_a_body_is_decoded_in_place() -> None:
    text = json.dumps({"inputs": [a_binary_input()]}).encode()
    memory = bytearray(-len(text) % 16 + len(text) + 8)
    body = memoryview(memory)[-len(text) % 16 :]
    body[:] = text + TWO
    assert np.shares_memory(decode_request(body, len(text)).inputs["x"], np.frombuffer(memory, np.uint8))


@pytest.mark.parametrize("shape", [[0], [2, 0], [0, 3, 0]], ids=str)
def test_tensors_without_elements_are_legal(shape: list[int]) -> None:
    sizes = {"shape": shape}
    request = decode(
        a_binary_input(0, **sizes),
        an_input(name="j", data=[], **sizes),
        an_input(name="s", datatype="BYTES", data=[], **sizes),
    )
    assert {tensor.shape for tensor in request.inputs.values()} == {tuple(shape)}


def test_a_tensor_of_rank_zero_is_one_element() -> None:
    request = decode(
        an_input(shape=[], data=[3]),
        an_input(name="s", shape=[], data=3),
        a_binary_input(4, name="b", shape=[]),
        tail=TWO[:4],
    )
    assert {name: tensor.tolist() for name, tensor in request.inputs.items()} == {"x": 3, "s": 3, "b": 1.5}


def test_header_length_zero_is_a_raw_request() -> None:
    body = bytearray(TWO)
    request = decode_request(body, "0")
    assert request.raw is body
    assert request.wants_binary
    assert not request.inputs


@pytest.mark.parametrize("header", ["-1", "x", "", "1_0", "+1", "1.0", "٣", "9" * 30, 10**6, -1], ids=str)
def test_a_header_length_that_is_none_is_refused(header: str | int) -> None:
    with pytest.raises(PayloadMalformedError, match="Inference-Header-Content-Length: expected"):
        decode_request(bytearray(b'{"inputs":[]}'), header)


@pytest.mark.parametrize(
    ("inputs", "tail", "message"),
    [
        ([7], b"", r"inputs\[0\]: expected an object, received 7"),
        ([an_input(name=None)], b"", r"inputs\[0\].name: expected a string, received null"),
        ([an_input(), an_input()], b"", "input 'x': expected once, received twice"),
        ([an_input(datatype="FP8")], b"", "input 'x'.datatype: expected one of BOOL, .*, received 'FP8'"),
        ([an_input(shape=None)], b"", "input 'x'.shape: expected a list of non-negative integers, received null"),
        ([an_input(shape=[2.0])], b"", "input 'x'.shape: expected non-negative integers, received 2.0"),
        ([an_input(shape=[True])], b"", "input 'x'.shape: expected non-negative integers, received true"),
        ([an_input(shape=[-1])], b"", "input 'x'.shape: expected non-negative integers, received -1"),
        ([an_input(shape=[2**62, 2**62])], b"", "input 'x'.shape: expected at most .* elements"),
        ([an_input(shape=[0, 2**62], data=[])], b"", "input 'x'.shape: expected at most .* elements"),
        ([an_input(shape=[1] * 65, data=[1])], b"", "input 'x'.shape: expected at most 64 axes, received 65"),
        ([an_input(data=[1])], b"", r"input 'x'.data: expected 2 elements for shape \[2\], received 1"),
        ([an_input(parameters=[])], b"", "input 'x'.parameters: expected an object, received a list of 0"),
        ([an_input(parameters={"k": []})], b"", "input 'x'.parameters.k: expected a string, number"),
        ([an_input(parameters={"binary_data_size": 8})], TWO, "input 'x': expected exactly one of data and"),
        ([{"name": "x", "datatype": "FP32", "shape": [2]}], b"", "input 'x': expected exactly one of data and"),
        ([a_binary_input()], b"", "input 'x': expected 8 bytes of binary data, received 0"),
        ([a_binary_input()], TWO[:7], "input 'x': expected 8 bytes of binary data, received 7"),
        (
            [a_binary_input()],
            TWO + b"\0",
            r"body: expected \d+ bytes \(the JSON and every binary_data_size\), received",
        ),
        ([a_binary_input(7)], TWO[:7], r"input 'x': expected 8 bytes for FP32 of shape \[2\], received 7"),
        ([a_binary_input(-8)], TWO, "binary_data_size: expected a number of bytes, received -8"),
        ([a_binary_input(True)], TWO, "binary_data_size: expected a number of bytes, received true"),
        ([a_binary_input(8.0)], TWO, "binary_data_size: expected a number of bytes, received 8.0"),
        ([a_binary_input(2**70)], TWO, "input 'x'"),
        ([a_binary_input(2, datatype="BOOL")], b"\x01\x02", "input 'x': expected BOOL bytes of 0 and 1, received 2"),
        (
            [a_binary_input(3, datatype="BYTES", shape=[1])],
            b"\0\0\0",
            "input 'x': expected 4 bytes of length .* element 0",
        ),
        ([a_binary_input(8, datatype="BYTES", shape=[1])], b"\5\0\0\0abcd", "element 0, received 1 too few"),
        ([a_binary_input(4, datatype="BYTES")], b"\0\0\0\0", r"expected 2 BYTES elements for shape \[2\], received 1"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(inputs: list[Json], tail: bytes, message: str) -> None:
    with pytest.raises(PayloadMalformedError, match=message):
        decode(*inputs, tail=tail)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": None}, "inputs: expected a list, received null"),
        ({"id": 7}, "id: expected a string, received 7"),
        ({"parameters": 7}, "parameters: expected an object, received 7"),
        (
            {"parameters": {"eps": [1]}},
            "parameters.eps: expected a string, number, boolean or null, received a list of 1",
        ),
        ({"parameters": {"triton_enable_empty_final_response": True}}, "begin with triton_ are reserved"),
        (
            {"parameters": {"binary_data_output": 1}},
            "parameters.binary_data_output: expected true or false, received 1",
        ),
        ({"outputs": {}}, "outputs: expected a list, received an object of 0"),
        ({"outputs": ["y"]}, r"outputs\[0\]: expected an object, received 'y'"),
        ({"outputs": [{}]}, r"outputs\[0\].name: expected a string, received null"),
        ({"outputs": [{"name": "y"}] * 2}, "output 'y': expected once, received twice"),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]}, "expected true or false, received 'yes'"),
    ],
)
def test_a_field_of_the_request_that_does_not_fit_is_refused(fields: Json, message: str) -> None:
    with pytest.raises(PayloadMalformedError, match=message):
        decode(an_input(), **fields)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"\xff\xfe", b"{"], ids=repr)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(PayloadMalformedError, match="body: expected"):
        decode_request(bytearray(body), None)


@pytest.mark.parametrize("parameter", ["classification", "shared_memory_region"])
def test_outputs_that_are_not_offered_say_so(parameter: str) -> None:
    with pytest.raises(UnsupportedError, match=f"output 'y': the parameter {parameter} is not offered"):
        decode(an_input(), outputs=[{"name": "y", "parameters": {parameter: 1}}])


def test_shared_memory_inputs_say_so() -> None:
    with pytest.raises(UnsupportedError, match="input 'x': shared memory is not offered"):
        decode(an_input(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8}))


def test_a_huge_name_is_not_repeated_in_the_message() -> None:
    with pytest.raises(PayloadMalformedError) as caught:
        decode(an_input(name="x" * 100_000, datatype="y" * 100_000))
    assert len(caught.value.message) < 400
