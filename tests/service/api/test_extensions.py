"""What the metadata of the server announces works; what is refused is not announced."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from tests.service.api.test_refusals import refused
from tests.service.engine import graphs

pytestmark = pytest.mark.asyncio(loop_scope="session")

NAME = "extended"
MODEL = f"/v2/models/{NAME}"
ROWS = np.array([[1.5, -2.0, 3.0], [0.0, 4.0, 5.0]], np.float32)


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _served(client: httpx.AsyncClient) -> None:
    checkpoint = (await client.post("/v1/checkpoints", content=graphs.doubling().SerializeToString())).json()["id"]
    await client.post("/v1/models", json={"name": NAME, "version": 1, "checkpoint": checkpoint, "fold": False})
    await client.post(f"/v2/repository/models/{NAME}/load")


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": ROWS.shape, "datatype": "FP32", "data": ROWS.reshape(-1).tolist()} | changes


async def _binary_tensor_data(client: httpx.AsyncClient) -> None:
    tensor = {"name": "x", "shape": ROWS.shape, "datatype": "FP32", "parameters": {"binary_data_size": ROWS.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    size = {"Inference-Header-Content-Length": str(len(head))}
    answer = await client.post(f"{MODEL}/infer", content=head + ROWS.tobytes(), headers=size)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.content[:length])["outputs"]
    assert [output["parameters"]["binary_data_size"] for output in outputs] == [ROWS.nbytes] * 2
    found = np.frombuffer(answer.content[length:], np.float32).reshape(2, *ROWS.shape)
    np.testing.assert_array_equal(found, [2 * ROWS, -ROWS])


async def _model_configuration(client: httpx.AsyncClient) -> None:
    config = (await client.get(f"{MODEL}/config")).json()
    assert (config["name"], config["backend"], config["max_batch_size"]) == (NAME, "onnxruntime", 32)
    (given,) = config["input"]
    assert (given["name"], given["data_type"], given["dims"]) == ("x", "TYPE_FP32", [3])


async def _model_repository(client: httpx.AsyncClient) -> None:
    async def state() -> str:
        index = (await client.post("/v2/repository/index")).json()
        (found,) = [entry["state"] for entry in index if entry["name"] == NAME]
        return str(found)

    for step, expected, status in (("unload", "UNAVAILABLE", 503), ("load", "READY", 200)):
        assert (await client.post(f"/v2/repository/models/{NAME}/{step}")).status_code == 200
        assert await state() == expected
        assert (await client.post(f"{MODEL}/infer", json={"inputs": [_tensor()]})).status_code == status


async def _parameters(client: httpx.AsyncClient) -> None:
    path = "/v2/models/normcore.rms_norm/infer"
    document = {"inputs": [_tensor(name="input")], "parameters": {"normalized_shape": "3", "eps": 1.0}}
    found = (await client.post(path, json=document)).json()["outputs"][0]["data"]
    exact = ROWS / np.sqrt(np.mean(np.float64(ROWS) ** 2, axis=1, keepdims=True) + 1.0)
    np.testing.assert_allclose(found, exact.reshape(-1), rtol=1e-6)
    document["parameters"] = {"normalized_shape": "3", "no_such": 1}
    refused(await client.post(path, json=document), 400, "parameter_invalid", "no_such")


async def _statistics(client: httpx.AsyncClient) -> None:
    async def counts() -> tuple[int, int]:
        (stats,) = (await client.get(f"{MODEL}/stats")).json()["model_stats"]
        return stats["inference_count"], stats["execution_count"]

    inferences, executions = await counts()
    assert (await client.post(f"{MODEL}/infer", json={"inputs": [_tensor()]})).status_code == 200
    assert await counts() == (inferences + len(ROWS), executions + 1)


ANNOUNCED: dict[str, Callable[[httpx.AsyncClient], Awaitable[None]]] = {
    "binary_tensor_data": _binary_tensor_data,
    "model_configuration": _model_configuration,
    "model_repository": _model_repository,
    "parameters": _parameters,
    "statistics": _statistics,
}


async def _extensions(client: httpx.AsyncClient) -> list[str]:
    found: list[str] = (await client.get("/v2")).json()["extensions"]
    return found


async def test_every_announced_extension_is_tried_here(client: httpx.AsyncClient) -> None:
    assert sorted(await _extensions(client)) == sorted(ANNOUNCED)


@pytest.mark.parametrize("name", ANNOUNCED)
async def test_an_announced_extension_works(client: httpx.AsyncClient, name: str) -> None:
    await ANNOUNCED[name](client)


ABSENT = {
    "trace": [("GET", "/v2/trace/setting"), ("POST", "/v2/trace/setting"), ("GET", f"{MODEL}/trace/setting")],
    "logging": [("GET", "/v2/logging"), ("POST", "/v2/logging")],
    "system_shared_memory": [
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        ("POST", "/v2/systemsharedmemory/unregister"),
    ],
    "cuda_shared_memory": [
        ("GET", "/v2/cudasharedmemory/region/r/status"),
        ("POST", "/v2/cudasharedmemory/region/r/register"),
        ("POST", "/v2/cudasharedmemory/unregister"),
    ],
}
ABSENT_PARAMETERS: dict[str, dict[str, Any]] = {
    "classification": {"outputs": [{"name": "sum", "parameters": {"classification": 2}}]},
    "system_shared_memory": {"outputs": [{"name": "sum", "parameters": {"shared_memory_region": "r"}}]},
    "cuda_shared_memory": {
        "inputs": [
            {key: value for key, value in _tensor().items() if key != "data"}
            | {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": ROWS.nbytes}}
        ]
    },
}


@pytest.mark.parametrize("name", ABSENT)
async def test_an_extension_whose_calls_are_refused_is_not_announced(client: httpx.AsyncClient, name: str) -> None:
    for method, path in ABSENT[name]:
        refused(await client.request(method, path, content=b"{}"), 501, "not_implemented", path)
    assert name not in await _extensions(client)


@pytest.mark.parametrize("name", ABSENT_PARAMETERS)
async def test_an_extension_whose_parameters_are_refused_is_not_announced(client: httpx.AsyncClient, name: str) -> None:
    document = {"inputs": [_tensor()]} | ABSENT_PARAMETERS[name]
    refused(await client.post(f"{MODEL}/infer", json=document), 501, "not_implemented", "not offered")
    assert name not in await _extensions(client)
