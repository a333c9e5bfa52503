import json

import numpy as np
import pytest

from service.codecs.oip import RequestedOutput, encode_response
from service.engine.protocol import Tensor
from service.errors import PayloadMalformedError

OUTPUTS: dict[str, Tensor] = {"y": np.array([[1, 2]], np.float32), "n": np.array([3], np.int64)}


def test_all_outputs_in_json_are_flat_and_have_no_header() -> None:
    encoded = encode_response("m", "3", OUTPUTS)
    assert encoded.content_type == "application/json"
    assert encoded.json_length is None
    assert encoded.headers == {}
    assert json.loads(b"".join(encoded.chunks)) == {
        "model_name": "m",
        "model_version": "3",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]},
            {"name": "n", "datatype": "INT64", "shape": [1], "data": [3]},
        ],
    }


def test_binary_outputs_follow_the_json_in_the_order_of_the_request() -> None:
    requested = (RequestedOutput("n", True), RequestedOutput("y", True))
    encoded = encode_response("m", "3", OUTPUTS, requested=requested)
    body = b"".join(encoded.chunks)
    assert encoded.content_type == "application/octet-stream"
    assert encoded.json_length is not None
    outputs = json.loads(body[: encoded.json_length])["outputs"]
    assert [output["name"] for output in outputs] == ["n", "y"]
    assert [output["parameters"] for output in outputs] == [{"binary_data_size": 8}, {"binary_data_size": 8}]
    assert body[encoded.json_length :] == OUTPUTS["n"].tobytes() + OUTPUTS["y"].tobytes()


def test_only_requested_outputs_are_sent_and_each_in_its_form() -> None:
    requested = (RequestedOutput("y", False), RequestedOutput("n", True))
    encoded = encode_response("m", "3", OUTPUTS | {"unasked": np.zeros(9)}, requested=requested, wants_binary=True)
    outputs = json.loads(b"".join(encoded.chunks)[: encoded.json_length])["outputs"]
    assert [sorted(output) for output in outputs] == [
        ["data", "datatype", "name", "shape"],
        ["datatype", "name", "parameters", "shape"],
    ]


def test_id_and_parameters_are_sent_when_there_are_any() -> None:
    encoded = encode_response("m", "3", {}, id="abc", parameters={"gap": float("inf"), "unset": None})
    text = b"".join(encoded.chunks)
    assert b'"id":"abc"' in text
    assert b'"parameters":{"gap":Infinity,"unset":null}' in text
    assert b"id" not in b"".join(encode_response("m", "3", {}, id="").chunks)


def test_an_empty_binary_output_still_makes_a_binary_response() -> None:
    encoded = encode_response("m", "3", {"y": np.zeros((0, 2), np.float32)}, wants_binary=True)
    assert encoded.json_length == len(b"".join(encoded.chunks))
    assert b'"binary_data_size":0' in encoded.chunks[0]


def test_an_output_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(PayloadMalformedError, match="output 'z': expected one of y, n"):
        encode_response("m", "3", OUTPUTS, requested=(RequestedOutput("z", True),))
