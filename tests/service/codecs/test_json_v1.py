import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from service.codecs import json_v1
from service.codecs.body import TensorBody
from service.engine.protocol import Tensor
from service.errors import PayloadMalformedError
from tests.service.codecs.strategies import assert_same_numbers, named_arrays, thorough

NAMES = {"input", "weight", "mask"}


def decode(**fields: object) -> TensorBody:
    return json_v1.decode(bytearray(json.dumps(fields).encode()), tensor_names=NAMES, query_parameters={})


@thorough
@given(outputs=named_arrays)
def test_what_is_encoded_can_be_posted_back(outputs: dict[str, Tensor]) -> None:
    encoded = json_v1.encode("m", outputs, {})
    written = json.loads(b"".join(encoded.chunks), parse_constant=lambda token: pytest.fail(token))["outputs"]
    body = json_v1.decode(bytearray(json.dumps(written).encode()), tensor_names=set(outputs), query_parameters={})
    assert list(body.tensors) == list(outputs)
    for name, array in outputs.items():
        assert_same_numbers(body.tensors[name], array)


def test_a_response_has_method_outputs_and_diagnostics() -> None:
    encoded = json_v1.encode("batch_norm", {"output": np.array([[1, np.nan]], np.float16)}, {"drift": float("-inf")})
    assert encoded.content_type == "application/json"
    assert json.loads(b"".join(encoded.chunks)) == {
        "method": "batch_norm",
        "outputs": {"output": {"shape": [1, 2], "datatype": "FP16", "data": [1.0, "NaN"]}},
        "diagnostics": {"drift": "-Infinity"},
    }


def test_nested_lists_are_fp32_and_scalars_have_rank_zero() -> None:
    body = decode(input=[[1, 2], [3, "NaN"]], weight=7, mask=None)
    assert body.tensors.keys() == {"input", "weight"}
    assert body.tensors["input"].dtype == body.tensors["weight"].dtype == np.float32
    assert body.tensors["input"].shape == (2, 2)
    assert body.tensors["weight"].shape == ()


def test_bare_tokens_are_read_too() -> None:
    body = json_v1.decode(b'{"input":[NaN,-Infinity,1]}', tensor_names=NAMES, query_parameters={})
    assert np.array_equal(body.tensors["input"], np.array([np.nan, -np.inf, 1], np.float32), equal_nan=True)


@pytest.mark.parametrize("weight_first", [True, False])
def test_plain_lists_take_the_datatype_of_input(weight_first: bool) -> None:
    whole = {"shape": [1], "datatype": "FP64", "data": [0.1]}
    fields: dict[str, object] = {"weight": [0.1], "mask": [True], "input": whole}
    body = decode(**(fields if weight_first else dict(reversed(fields.items()))))
    assert {name: tensor.dtype.name for name, tensor in body.tensors.items()} == {
        "input": "float64",
        "weight": "float64",
        "mask": "bool",
    }


def test_a_method_without_input_reads_plain_lists_as_fp32() -> None:
    fields = {"weight": [1], "input": {"datatype": "FP64"}}
    with pytest.raises(
        PayloadMalformedError, match="input: expected a string, number, boolean or null, received an obj"
    ):
        json_v1.decode(json.dumps(fields).encode(), tensor_names={"weight"}, query_parameters={})


def test_other_fields_are_parameters_and_outputs_are_named() -> None:
    body = decode(
        input=[1], eps=1e-3, training=True, momentum=None, convention="onnx", axes=[2, -1], outputs=["a", "b"]
    )
    assert body.parameters == {"eps": 1e-3, "training": True, "momentum": None, "convention": "onnx", "axes": "2,-1"}
    assert body.outputs == ("a", "b")
    assert decode(input=[1], outputs=None).outputs is None
    assert decode(input=[1]).outputs is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": [[1], [2, 3]]}, r"input\[1\]: expected a list of 1 like the first one, received a list of 2"),
        ({"input": "1"}, "input: expected a number .*, received '1'"),
        ({"input": {"shape": [1], "data": [1]}}, "input.datatype: expected one of"),
        ({"weight": {"shape": [1], "data": [1]}}, "weight: expected nested lists or an object .* of data, shape"),
        ({"weight": {}}, "weight: expected nested lists or an object of shape, datatype and data, received .* nothing"),
        ({"weight": {"shape": [1], "datatype": "BYTES", "data": ["a"]}}, "weight.datatype: expected a number or BOOL"),
        ({"weight": {"shape": [-1], "datatype": "FP32", "data": [1]}}, "weight.shape: expected non-negative integers"),
        ({"weight": {"shape": [2], "datatype": "FP32", "data": [1]}}, "weight.data: expected 2 elements"),
        ({"outputs": "output"}, "outputs: expected a list, received 'output'"),
        ({"outputs": [1]}, "outputs: expected a string, received 1"),
        ({"eps": {}}, "eps: expected a string, number, boolean or null, received an object of 0"),
        ({"axes": [1, 2.0]}, "axes: expected a list of integers, as no tensor has this name, received 2.0 in it"),
        ({"axes": [[1]]}, "axes: expected a list of integers, as no tensor has this name, received a list of 1 in it"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PayloadMalformedError, match=message):
        decode(**fields)


def test_query_parameters_beside_a_json_body_are_refused() -> None:
    with pytest.raises(PayloadMalformedError, match="query parameter 'eps': expected as a field of the JSON body"):
        json_v1.decode(b'{"input":[1]}', tensor_names=NAMES, query_parameters={"eps": "1"})
