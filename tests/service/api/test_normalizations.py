"""Batch norm over HTTP: every encoding and both surfaces give the same bits."""

import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

pytestmark = pytest.mark.asyncio(loop_scope="session")

PATH = "/v1/normalizations/batch_norm"
JSON, NPZ, NPY, SAFETENSORS = (
    "application/json",
    "application/x-npz",
    "application/x-npy",
    "application/vnd.safetensors",
)
OUTPUTS = {"output", "mean", "var", "invstd", "running_mean", "running_var", "num_batches_tracked"}

GRADIENTS = {"grad_input", "grad_weight", "grad_bias"}


def tensors() -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(3)
    return {
        "input": (generator.standard_normal((4, 3, 5, 2)) * 3 + 7).astype(np.float32),
        "weight": generator.standard_normal(3).astype(np.float32),
        "bias": generator.standard_normal(3).astype(np.float32),
        "running_mean": generator.standard_normal(3).astype(np.float32),
        "running_var": generator.uniform(0.5, 2, 3).astype(np.float32),
        "num_batches_tracked": np.array(4, np.int64),
    }


def as_json(named: dict[str, NDArray[Any]]) -> dict[str, Any]:
    datatypes = {"float32": "FP32", "int64": "INT64"}
    return {
        name: {"shape": list(array.shape), "datatype": datatypes[array.dtype.name], "data": array.reshape(-1).tolist()}
        for name, array in named.items()
    }


def as_npz(named: dict[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **named)
    return buffer.getvalue()


def from_answer(answer: httpx.Response) -> dict[str, NDArray[Any]]:
    assert answer.status_code == 200, answer.text
    media = answer.headers["content-type"]
    if media == JSON:
        numpy_types = {"FP32": np.float32, "INT64": np.int64}
        return {
            name: np.array(item["data"], numpy_types[item["datatype"]]).reshape(item["shape"])
            for name, item in answer.json()["outputs"].items()
        }
    if media == NPZ:
        with np.load(io.BytesIO(answer.content)) as archive:
            return dict(archive)
    if media == NPY:
        return {"output": np.load(io.BytesIO(answer.content))}
    assert media == SAFETENSORS
    return dict(safetensors.numpy.load(answer.content))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
async def test_every_encoding_gives_the_same_bits(client: httpx.AsyncClient, training: bool) -> None:
    named = tensors()
    query = {"training": str(training).lower(), "eps": "0.001"}
    calls: list[dict[str, Any]] = [
        {"json": as_json(named) | {"training": training, "eps": 1e-3}},
        {"content": as_npz(named), "headers": {"content-type": NPZ}, "params": query},
        {"content": safetensors.numpy.save(named), "headers": {"content-type": SAFETENSORS}, "params": query},
    ]
    results = [from_answer(await client.post(PATH, **call)) for call in calls]
    results += [
        from_answer(await client.post(PATH, **calls[0], headers={"accept": media})) for media in (NPZ, SAFETENSORS)
    ]
    expected = OUTPUTS if training else {"output", "mean", "var", "invstd"}
    for result in results:
        assert set(result) == expected
        for name, array in result.items():
            assert array.dtype == results[0][name].dtype
            np.testing.assert_array_equal(array, results[0][name])


async def test_training_equals_the_formula_in_float64(client: httpx.AsyncClient) -> None:
    named = tensors()
    result = from_answer(await client.post(PATH, json=as_json(named) | {"training": True, "momentum": 0.25}))
    wide = {name: array.astype(np.float64) for name, array in named.items()}
    mean, var = wide["input"].mean((0, 2, 3)), wide["input"].var((0, 2, 3))
    standardized = (wide["input"] - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
    expected = standardized * wide["weight"][:, None, None] + wide["bias"][:, None, None]
    np.testing.assert_allclose(result["output"], expected, atol=2e-6)
    np.testing.assert_allclose(result["running_mean"], 0.75 * wide["running_mean"] + 0.25 * mean, rtol=1e-6)
    np.testing.assert_allclose(result["running_var"], 0.75 * wide["running_var"] + 0.25 * var * 40 / 39, rtol=1e-6)
    assert result["num_batches_tracked"] == 5


async def test_npy_takes_and_gives_the_one_tensor(client: httpx.AsyncClient) -> None:
    buffer = io.BytesIO()
    np.save(buffer, tensors()["input"])
    call: dict[str, Any] = {"content": buffer.getvalue(), "params": {"training": "true"}}
    answer = await client.post(PATH, **call, headers={"content-type": NPY})
    assert answer.headers["content-type"] == NPY
    alone = from_answer(answer)["output"]
    full = from_answer(await client.post(PATH, **call, headers={"content-type": NPY, "accept": NPZ}))
    assert set(full) == OUTPUTS - {"running_mean", "running_var", "num_batches_tracked"}
    np.testing.assert_array_equal(alone, full["output"])


async def test_both_surfaces_give_the_same_bits(client: httpx.AsyncClient) -> None:
    named = tensors()
    own = from_answer(await client.post(PATH, json=as_json(named) | {"training": True}))
    inputs = [{"name": name} | item for name, item in as_json(named).items()]
    answer = await client.post(
        "/v2/models/normcore.batch_norm/infer", json={"inputs": inputs, "parameters": {"training": True}}
    )
    outputs = {item["name"]: item for item in answer.json()["outputs"]}
    assert set(outputs) == set(own)
    for name, array in own.items():
        assert outputs[name]["shape"] == list(array.shape)
        np.testing.assert_array_equal(np.array(outputs[name]["data"], array.dtype), array.reshape(-1))


async def test_outputs_can_be_named(client: httpx.AsyncClient) -> None:
    document = {"input": [[1, 2], [3, 4], [5, 9]], "training": True, "outputs": ["var", "mean"]}
    outputs = (await client.post(PATH, json=document)).json()["outputs"]
    assert {name: item["data"] for name, item in outputs.items()} == {
        "mean": [3.0, 5.0],
        "var": pytest.approx([8 / 3, 26 / 3], rel=1e-6),
    }


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
async def test_every_float_datatype_is_answered_in_itself(client: httpx.AsyncClient, datatype: str) -> None:
    tensor = {"shape": [3, 2], "datatype": datatype, "data": [1, 2, 3, 4, 5, 9]}
    outputs = (await client.post(PATH, json={"input": tensor, "training": True})).json()["outputs"]
    assert outputs["output"]["datatype"] == datatype
    assert outputs["mean"]["datatype"] == ("FP64" if datatype == "FP64" else "FP32")


async def test_non_finite_values_go_in_and_out_as_strings(client: httpx.AsyncClient) -> None:
    document = {"input": [["NaN", 1], [2, "Infinity"], [3, "-Infinity"]], "running_mean": [0, 0], "running_var": [1, 1]}
    answer = await client.post(PATH, json=document)
    data = answer.json()["outputs"]["output"]["data"]
    assert (data[0], data[3], data[5]) == ("NaN", "Infinity", "-Infinity")
    assert "NaN" not in answer.text.replace('"NaN"', "")


async def test_diagnostics_travel_in_every_encoding(client: httpx.AsyncClient) -> None:
    document = {"input": [[1, 5], [2, 5], [3, 5]], "training": True}
    diagnostics = (await client.post(PATH, json=document)).json()["diagnostics"]
    assert diagnostics["constant_channels"] == 1
    for media in (NPZ, NPY):
        answer = await client.post(PATH, json=document, headers={"accept": media})
        assert json.loads(answer.headers["normserve-diagnostics"]) == diagnostics
    inputs = [{"name": "input", "shape": [3, 2], "datatype": "FP32", "data": [1, 5, 2, 5, 3, 5]}]
    answer = await client.post(
        "/v2/models/normcore.batch_norm/infer", json={"inputs": inputs, "parameters": {"training": True}}
    )
    assert json.loads(answer.json()["parameters"]["diagnostics"]) == diagnostics


async def test_methods_describe_themselves(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/normalizations")).json()["normalizations"]
    described = (await client.get(PATH)).json()
    assert described in listed
    assert described["name"] == "batch_norm"
    assert {tensor["name"] for tensor in described["tensors"]} == set(tensors()) | {"grad_output", "mask"} | {
        "grad_output",
        "mask",
    }
    assert {output["name"] for output in described["outputs"]} == OUTPUTS | GRADIENTS
    assert described["formula"]
    assert described["source"]


async def test_an_empty_batch_changes_nothing(client: httpx.AsyncClient) -> None:
    named = tensors() | {"input": np.empty((0, 3, 5, 2), np.float32)}
    result = from_answer(await client.post(PATH, json=as_json(named) | {"training": True}))
    assert result["output"].shape == (0, 3, 5, 2)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        np.testing.assert_array_equal(result[name], named[name])


async def test_the_device_is_a_parameter_of_every_call(client: httpx.AsyncClient) -> None:
    url = "/v1/normalizations/layer_norm"
    answer = await client.post(url, json={"input": [[1, 3]], "normalized_shape": [2], "device": "cpu"})
    assert answer.status_code == 200, answer.text
    answer = await client.post(url, json={"input": [[1, 3]], "normalized_shape": [2], "device": "cuda:99"})
    assert (answer.status_code, answer.json()["code"]) == (422, "parameter_invalid")
    assert answer.json()["error"].startswith("device: expected ")
    buffer = io.BytesIO()
    np.save(buffer, np.array([[1, 3]], np.float32))
    headers = {"Content-Type": "application/x-npy"}
    for device, status in (("cpu", 200), ("tpu", 422)):
        query = {"normalized_shape": "2", "device": device}
        answer = await client.post(url, params=query, content=buffer.getvalue(), headers=headers)
        assert answer.status_code == status, answer.text
