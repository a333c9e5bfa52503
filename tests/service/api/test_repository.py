"""Loading with overrides: a configuration, files, and what is wrong with either."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.service import hostile
from tests.service.api.test_refusals import refused
from tests.service.conftest import http, running_app, small_settings
from tests.service.engine import graphs

pytestmark = pytest.mark.asyncio(loop_scope="session")

FILE = base64.b64encode(graphs.doubling().SerializeToString()).decode()
OTHER = base64.b64encode(graphs.free_columns().SerializeToString()).decode()
LOAD = "/v2/repository/models/m/load"


@pytest_asyncio.fixture(loop_scope="session")
async def apart(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with running_app(small_settings(tmp_path)) as app, http(app) as opened:
        yield opened


async def _load(client: httpx.AsyncClient, config: Any, **files: str) -> httpx.Response:
    text = config if isinstance(config, str) else json.dumps(config)
    named = {f"file:{version[1:]}/model.onnx": content for version, content in files.items()}
    return await client.post(LOAD, json={"parameters": {"config": text} | named})


async def _metadata(client: httpx.AsyncClient, version: str = "") -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v2/models/m{version}")).json()
    return found


async def _infer(client: httpx.AsyncClient) -> list[float]:
    x = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    answer = await client.post("/v2/models/m/infer", json={"inputs": [x]})
    found: list[float] = answer.json()["outputs"][0]["data"]
    return found


async def test_files_become_the_versions_and_the_configuration_their_options(apart: httpx.AsyncClient) -> None:
    config = {
        "name": "m",
        "backend": "onnxruntime",
        "max_batch_size": 8,
        "dynamic_batching": {"max_queue_delay_microseconds": "100"},
        "instance_group": [{"count": 2, "kind": "KIND_CPU"}],
    }
    answer = await _load(apart, config, v1=FILE, v3=OTHER)
    assert (answer.status_code, answer.content) == (200, b""), answer.text
    assert (await _metadata(apart))["versions"] == ["1", "3"]
    assert [tensor["name"] for tensor in (await _metadata(apart))["outputs"]] == ["y", "z"]
    assert [tensor["name"] for tensor in (await _metadata(apart, "/versions/1"))["outputs"]] == ["sum", "negative"]
    shown = (await apart.get("/v2/models/m/versions/1/config")).json()
    assert shown["max_batch_size"] == 8
    assert shown["dynamic_batching"]["max_queue_delay_microseconds"] == 100
    assert shown["instance_group"][0]["count"] == 2
    assert shown["input"][0]["dims"] == [3]
    assert await _infer(apart) == [-1, -2, -3]

    assert (await _load(apart, {}, v1=FILE)).status_code == 200
    assert (await _metadata(apart))["versions"] == ["1"]
    assert await _infer(apart) == [2, 4, 6]


async def test_a_configuration_alone_changes_the_options(apart: httpx.AsyncClient) -> None:
    assert (await _load(apart, {"max_batch_size": 4}, v1=FILE)).status_code == 200
    assert await _infer(apart) == [2, 4, 6]
    assert (await _load(apart, {"max_batch_size": 0})).status_code == 200
    assert (await apart.get("/v2/models/m/config")).json()["max_batch_size"] == 0
    assert await _infer(apart) == [2, 4, 6]
    stats = (await apart.get("/v2/models/m/stats")).json()["model_stats"][0]
    assert stats["inference_count"] == 2  # the same version goes on counting
    assert (await apart.post(LOAD, json={"parameters": {"config": {"max_batch_size": 2}}})).status_code == 200


async def test_what_was_loaded_so_is_there_after_a_restart(tmp_path: Path) -> None:
    for is_first in (True, False):
        async with running_app(small_settings(tmp_path)) as app, http(app) as client:
            if is_first:
                assert (await _load(client, {"max_batch_size": 4}, v2=FILE)).status_code == 200
            assert await _infer(client) == [2, 4, 6]
            assert (await client.get("/v2/models/m/config")).json()["max_batch_size"] == 4


async def _served(client: httpx.AsyncClient) -> tuple[list[str], list[str]]:
    """Versions in the metadata, and those in the index, ready ones with a star."""
    index = (await client.post("/v2/repository/index")).json()
    of_model = [entry["version"] + "*" * (entry["state"] == "READY") for entry in index if entry["name"] == "m"]
    return (await _metadata(client)).get("versions", []), of_model


@pytest.mark.parametrize(
    ("policy", "served", "index"),
    [
        ({"all": {}}, ["1", "3", "7"], ["1*", "3*", "7*"]),
        ({"latest": {}}, ["7"], ["1", "3", "7*"]),
        ({"latest": {"num_versions": 2}}, ["3", "7"], ["1", "3*", "7*"]),
        ({"latest": {"num_versions": "9"}}, ["1", "3", "7"], ["1*", "3*", "7*"]),
        ({"specific": {"versions": ["3", 1]}}, ["1", "3"], ["1*", "3*", "7"]),
    ],
    ids=["all", "latest", "two latest", "more than there are", "specific"],
)
async def test_a_version_policy_chooses_what_is_served(
    tmp_path: Path, policy: dict[str, Any], served: list[str], index: list[str]
) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        answer = await _load(client, {"version_policy": policy}, v1=FILE, v3=FILE, v7=OTHER)
        assert answer.status_code == 200, answer.text
        assert await _served(client) == (served, index)
        for version in ("1", "3", "7"):
            status = 200 if version in served else 503
            assert (await client.get(f"/v2/models/m/versions/{version}/ready")).status_code == status
            assert (await client.get(f"/v2/models/m/versions/{version}/config")).status_code == status
        shown = (await client.get("/v2/models/m/config")).json()["version_policy"]
        assert (await _load(client, {"version_policy": shown})).status_code == 200  # as it was told
        assert await _served(client) == (served, index)
        assert (await client.post("/v2/repository/models/m/unload")).status_code == 200
        assert (await client.post(LOAD)).status_code == 200  # and remembered
        assert await _served(client) == (served, index)
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        assert await _served(client) == (served, index)


async def test_another_policy_loads_and_unloads_versions(apart: httpx.AsyncClient) -> None:
    assert (await _load(apart, {}, v1=FILE, v2=OTHER)).status_code == 200
    assert (await _load(apart, {"version_policy": {"specific": {"versions": [1]}}})).status_code == 200
    assert await _served(apart) == (["1"], ["1*", "2"])
    assert await _infer(apart) == [2, 4, 6]
    path = "/v2/models/m/versions/2/infer"
    refused(await apart.post(path, json={"inputs": []}), 503, "model_not_ready", "version policy")
    absent = {"version_policy": {"specific": {"versions": [1, 5]}}}
    refused(await _load(apart, absent), 400, "parameter_invalid", "versions among 1, 2", "5")
    assert await _served(apart) == (["1"], ["1*", "2"])
    refused(await apart.get("/v2/models/m/versions/5"), 404, "model_not_found", "no version 5")
    assert (await _load(apart, {"version_policy": {"latest": {}}})).status_code == 200
    assert await _served(apart) == (["2"], ["1", "2*"])


async def test_a_new_version_is_served_and_the_policy_counts_at_the_next_load(apart: httpx.AsyncClient) -> None:
    assert (await _load(apart, {"version_policy": {"latest": {}}}, v1=FILE)).status_code == 200
    checkpoint = (await apart.get("/v1/models/m")).json()["models"][0]["checkpoint"]
    document = {"name": "m", "checkpoint": checkpoint, "fold": False}
    assert (await apart.post("/v1/models", json=document)).status_code == 201
    assert (await _served(apart))[0] == ["1", "2"]
    assert (await apart.post(LOAD)).status_code == 200
    assert await _served(apart) == (["2"], ["1", "2*"])


async def test_a_load_that_fails_leaves_the_old_versions_serving(apart: httpx.AsyncClient) -> None:
    assert (await _load(apart, {}, v1=FILE)).status_code == 200
    broken = base64.b64encode(b"no model at all").decode()
    refused(await _load(apart, {}, v1=OTHER, v2=broken), 400, "checkpoint_invalid")
    dependent = base64.b64encode(graphs.centered_over_the_batch().SerializeToString()).decode()
    refused(await _load(apart, {"max_batch_size": 4}, v1=dependent), 400, "parameter_invalid", "max_batch_size")
    assert (await _metadata(apart))["versions"] == ["1"]
    assert await _infer(apart) == [2, 4, 6]
    assert (await apart.get("/v2/models/m/ready")).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "status", "words"),
    [
        ({"file:1/model.onnx": FILE}, 400, "config"),
        ({"config": "{}", "file:1/model.py": FILE}, 400, "file:<version>/model.onnx"),
        ({"config": "{}", "file:../model.onnx": FILE}, 400, "file:<version>/model.onnx"),
        ({"config": "{}", "file:0/model.onnx": FILE}, 400, "file:<version>/model.onnx"),
        ({"config": "{}", "file:1/model.onnx": "not base64!"}, 400, "base64"),
        ({"config": "{}", "file:1/model.onnx": "\u00e9"}, 400, "base64"),
        ({"config": "{}", "file:1/model.onnx": 7}, 400, "base64"),
        ({"config": "{"}, 400, "JSON"),
        ({"config": "[]"}, 400, "object"),
        ({"config": 7}, 400, "object"),
        ({"config": '{"max_batch_size": -1}'}, 400, "max_batch_size"),
        ({"config": '{"max_batch_size": true}'}, 400, "max_batch_size"),
        ({"config": '{"instance_group": []}'}, 400, "instance_group"),
        ({"config": '{"dynamic_batching": 3}'}, 400, "dynamic_batching"),
        ({"config": '{"sequence_batching": {}}'}, 501, "sequence_batching"),
        ({"config": '{"name": "another"}'}, 400, "own name"),
        ({"config": '{"platform": "tensorflow_graphdef"}'}, 501, "onnxruntime_onnx"),
        ({"config": '{"version_policy": {}}'}, 400, "all, latest and specific"),
        ({"config": '{"version_policy": {"all": {}, "latest": {}}}'}, 400, "all, latest and specific"),
        ({"config": '{"version_policy": {"newest": {}}}'}, 400, "all, latest and specific"),
        ({"config": '{"version_policy": {"latest": {"num_versions": -1}}}'}, 400, "latest.num_versions"),
        ({"config": '{"version_policy": {"specific": {}}}'}, 400, "specific.versions"),
        ({"config": '{"version_policy": {"specific": {"versions": [1.5]}}}'}, 400, "specific.versions"),
        ({"config": '{"model_warmup": [{}]}'}, 501, "model_warmup"),
        ({"config": '{"parameters": {"a": {"string_value": "b"}}}'}, 501, "parameters"),
        ({"config": '{"instance_group": [{"kind": "KIND_GPU"}]}'}, 501, "KIND_AUTO"),
        ({"unknown": 1}, 501, "unknown"),
    ],
)
async def test_overrides_that_cannot_be_are_refused(
    client: httpx.AsyncClient, parameters: dict[str, Any], status: int, words: str
) -> None:
    answer = await client.post(LOAD, json={"parameters": parameters})
    assert answer.status_code == status
    assert words in answer.json()["error"]


async def test_names_and_sizes_are_bounded(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        refused(await client.post(LOAD, json={"parameters": {"config": "{}"}}), 404, "model_not_found")
        long = base64.b64encode(bytes(200_000)).decode()
        refused(await _load(client, {}, v1=long), 413, "payload_too_large", "NORMSERVE_MAX_JSON_BYTES")
        builtin = "/v2/repository/models/normcore.rms_norm/load"
        document = {"parameters": {"config": "{}", "file:1/model.onnx": FILE}}
        refused(await client.post(builtin, json=document), 409, "conflict", "reserved")
        refused(await client.post(builtin, json={"parameters": {"config": "{}"}}), 409, "conflict", "built in")


async def test_files_that_come_with_a_load_count_against_the_receive_budget(tmp_path: Path) -> None:
    document = json.dumps({"parameters": {"config": "{}", "file:1/model.onnx": FILE}}).encode()
    settings = small_settings(tmp_path, receive_budget_bytes=len(document) * 3 // 2, body_timeout_s=5)
    async with running_app(settings) as app, http(app) as client:
        release = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield document[:-1]
            await release.wait()
            yield document[-1:]

        first = asyncio.create_task(client.post(LOAD, content=slow()))
        await asyncio.sleep(0.05)
        refused(await client.post(LOAD, content=document), 429, "overloaded", "NORMSERVE_RECEIVE_BUDGET_BYTES")
        release.set()
        assert (await first).status_code == 200
        assert "normserve_receive_budget_used_bytes 0" in (await client.get("/metrics")).text
        assert (await client.post(LOAD, content=document)).status_code == 200


async def test_an_uploaded_bomb_stays_in_the_sandbox(client: httpx.AsyncClient) -> None:
    bomb = base64.b64encode(hostile.gigabytes()).decode()
    answer = await _load(client, {}, v1=bomb)
    assert answer.status_code == 400, answer.text
    assert (await client.get("/v2/health/live")).status_code == 200
