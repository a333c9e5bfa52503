"""The documentation: complete, true (every example is executed), and readable without internet."""

import re
from typing import Any

import httpx
import pytest

CREATING = ("/v1/statistics", "/v1/statistics/merge")

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    content: dict[str, Any] = (await client.get("/openapi.json")).json()
    return content


async def test_every_operation_is_described(client: httpx.AsyncClient) -> None:
    paths = (await document(client))["paths"]
    assert {"/v1/normalizations/batch_norm", "/v2/models/{name}/infer", "/v1/checkpoints/{checkpoint_id}/fold"} <= set(
        paths
    )
    for path, item in paths.items():
        for method, operation in item.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            assert operation["responses"]["default"]["content"]["application/json"]["schema"], (method, path)
            for parameter in operation.get("parameters", ()):
                assert parameter.get("description"), (method, path, parameter["name"])
            named = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path)), (method, path)


async def test_operation_ids_are_names_of_their_own(client: httpx.AsyncClient) -> None:
    paths = (await document(client))["paths"]
    names = [operation["operationId"] for item in paths.values() for operation in item.values()]
    assert len(names) == len(set(names))
    assert {"upload_checkpoint", "read_config", "read_config_version", "normalize_batch_norm", "infer"} <= set(names)


async def test_every_reference_resolves(client: httpx.AsyncClient) -> None:
    content = await client.get("/openapi.json")
    schemas = content.json()["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', content.text))
    assert references
    assert references <= set(schemas)


async def test_every_self_contained_example_runs(client: httpx.AsyncClient) -> None:
    ran = []
    for path, item in (await document(client))["paths"].items():
        body = item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" not in body or "checkpoint" in f"{path}{body['example']}":
            continue  # examples that need an uploaded file run in the README's test
        if "{name}/" in path and "/repository/" in path:
            continue  # a model that can be loaded needs a file too
        values = {parameter["name"]: parameter.get("example") for parameter in item["post"].get("parameters", [])}
        made = [(await client.post("/v1/statistics", json={"num_features": 2})).json()["id"] for _ in range(2)]
        values["statistics_id"] = made[0]
        example = {"ids": made} if path == "/v1/statistics/merge" else body["example"]
        url = path.format(**values)
        answer = await client.post(url, json=example)
        assert answer.status_code == (201 if path in CREATING else 200), (url, answer.text)
        ran.append(path)
    assert {*CREATING, "/v1/statistics/{statistics_id}/batches", "/v2/models/{name}/infer"} <= set(ran)
    assert "/v2/repository/index" in ran


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
async def test_the_pages_need_no_internet(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    assert answer.status_code == 200
    loaded = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert any(link.endswith(".js") for link in loaded)
    for link in loaded:
        assert not link.startswith(("http:", "https:", "//")), link
        assert (await client.get(link)).status_code == 200, link


async def test_info_names_versions_and_limits(client: httpx.AsyncClient) -> None:
    info = (await client.get("/v1/info")).json()
    assert info["name"] == "normserve"
    assert set(info["libraries"]) == {"torch", "onnx", "onnxruntime"}
    assert info["threads"] >= 1
    assert info["normalization_device"] == "cpu"
    assert info["limits"]["max_body_bytes"] == 1_000_000
