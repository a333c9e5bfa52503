"""The Open Inference Protocol's management surface, as its clients read it."""

import json
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service import hostile
from tests.service.engine import graphs

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL = "/v2/models/normcore.batch_norm"
RAW = {"Inference-Header-Content-Length": "0"}
ONE_INPUT: dict[str, Any] = {
    "inputs": [{"name": "input", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}],
    "parameters": {"training": True},
}


async def serve(client: httpx.AsyncClient, name: str, *, fold: bool = True) -> dict[str, Any]:
    uploaded = (await client.post("/v1/checkpoints", content=hostile.small_conv())).json()["id"]
    answer = await client.post("/v1/models", json={"name": name, "checkpoint": uploaded, "fold": fold})
    assert answer.status_code == 201, answer.text
    content: dict[str, Any] = answer.json()
    return content


async def test_health_answers_what_clients_parse(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True, "live": True}
    assert (await client.get(f"{MODEL}/ready")).json() == {"name": "normcore.batch_norm", "ready": True}


async def test_server_metadata_stands_at_both_spellings(client: httpx.AsyncClient) -> None:
    metadata = (await client.get("/v2")).json()
    assert metadata["name"] == "normserve"
    assert "binary_tensor_data" in metadata["extensions"]
    assert (await client.get("/v2/")).json() == metadata


async def test_model_metadata_and_configuration(client: httpx.AsyncClient) -> None:
    metadata = (await client.get(MODEL)).json()
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"][0] == {"name": "input", "datatype": "FP32", "shape": [-1]}
    assert (await client.get(f"{MODEL}/versions/1")).json() == metadata
    config = (await client.get(f"{MODEL}/config")).json()
    assert config["max_batch_size"] == 0
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert [tensor["optional"] for tensor in config["input"]].count(False) == 1


async def test_the_index_names_state_and_reason(client: httpx.AsyncClient) -> None:
    await serve(client, "indexed")
    await client.post("/v2/repository/models/indexed/unload")
    for content in (b"", b"{}"):
        index = (await client.post("/v2/repository/index", content=content)).json()
        by_name = {entry["name"]: entry for entry in index}
        assert by_name["indexed"] == {
            "name": "indexed",
            "version": "1",
            "state": "UNAVAILABLE",
            "reason": "unloaded",
        }
        assert by_name["normcore.batch_norm"]["state"] == "READY"
    ready = (await client.post("/v2/repository/index", json={"ready": True})).json()
    assert "indexed" not in {entry["name"] for entry in ready}
    answer = await client.post("/v2/repository/index", json={"ready": "yes"})
    assert (answer.status_code, "ready" in answer.json()["error"]) == (400, True)


async def test_statistics_count_successes_and_failures(client: httpx.AsyncClient) -> None:
    await serve(client, "counted")
    tensor = {"name": "x", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": [1] * 12}
    for data in ([1] * 12, [2] * 12):
        await client.post("/v2/models/counted/infer", json={"inputs": [tensor | {"data": data}]})
    await client.post("/v2/models/counted/infer", json={"inputs": [tensor | {"datatype": "FP64"}]})
    everything = (await client.get("/v2/models/stats")).json()["model_stats"]
    statistics = (await client.get("/v2/models/counted/stats")).json()["model_stats"][0]
    assert statistics in everything
    assert (statistics["inference_count"], statistics["execution_count"]) == (2, 2)
    counts = {name: part["count"] for name, part in statistics["inference_stats"].items()}
    assert counts == {
        "success": 2,
        "fail": 1,
        "queue": 2,
        "compute_input": 2,
        "compute_infer": 2,
        "compute_output": 2,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert statistics["last_inference"] > 1_700_000_000_000


async def test_versions_are_served_side_by_side(client: httpx.AsyncClient) -> None:
    first, second = await serve(client, "versions", fold=False), await serve(client, "versions", fold=True)
    assert (first["version"], second["version"]) == (1, 2)
    assert first["served_checkpoint"] == first["checkpoint"] != second["served_checkpoint"]
    assert second["fold"]["verdict"] == "equivalent"
    assert (await client.get("/v2/models/versions")).json()["versions"] == ["1", "2"]
    tensor = {"name": "x", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": list(range(12))}
    answers = [
        (await client.post(f"/v2/models/versions{suffix}/infer", json={"inputs": [tensor]})).json()
        for suffix in ("", "/versions/2", "/versions/1")
    ]
    assert [answer["model_version"] for answer in answers] == ["2", "2", "1"]
    assert answers[0]["outputs"] == answers[1]["outputs"]
    assert answers[2]["outputs"][0]["data"] == pytest.approx(answers[1]["outputs"][0]["data"], abs=1e-5)
    assert (await client.delete("/v1/models/versions/versions/2")).status_code == 204
    assert (await client.post("/v2/models/versions/infer", json={"inputs": [tensor]})).json()["model_version"] == "1"


async def test_infer_ignores_the_content_type(client: httpx.AsyncClient) -> None:
    for content_type in ("application/octet-stream", "application/json", "text/plain"):
        answer = await client.post(f"{MODEL}/infer", json=ONE_INPUT, headers={"content-type": content_type})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert "inference-header-content-length" not in answer.headers


async def test_a_raw_binary_request_needs_no_json(client: httpx.AsyncClient) -> None:
    checkpoint = (await client.post("/v1/checkpoints", content=graphs.doubling().SerializeToString())).json()["id"]
    assert (await client.post("/v1/models", json={"name": "raw", "checkpoint": checkpoint})).status_code == 201
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    answer = await client.post("/v2/models/raw/infer", content=rows.tobytes(), headers=RAW)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    assert [output["shape"] for output in json.loads(answer.content[:length])["outputs"]] == [[2, 3], [2, 3]]
    found = np.frombuffer(answer.content[length:], np.float32).reshape(2, 2, 3)
    np.testing.assert_array_equal(found, [2 * rows, -rows])


async def test_a_raw_binary_request_whose_shape_is_not_known_is_refused(client: httpx.AsyncClient) -> None:
    await serve(client, "raw images")  # two free axes behind the batch
    answer = await client.post("/v2/models/raw images/infer", content=bytes(48), headers=RAW)
    assert answer.status_code == 400
    assert "free axis" in answer.json()["error"]


async def test_a_timeout_of_a_request_is_504(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{MODEL}/infer", json=ONE_INPUT | {"parameters": {"training": True, "timeout": 1}})
    assert answer.status_code == 504
    assert answer.json()["code"] == "deadline_exceeded"


async def test_a_request_id_is_echoed_or_made(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v2/health/live", headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for offered in ("", "a b", "x" * 200):
        answer = await client.get("/v2/health/live", headers={"x-request-id": offered})
        assert answer.headers["x-request-id"] not in ("", offered)
