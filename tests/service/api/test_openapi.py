"""The documentation: complete, and readable without internet."""

import json
import re
from typing import Any

import httpx
import pytest

from service.api.errors import TABLE

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


async def test_what_may_be_null_says_what_null_means(client: httpx.AsyncClient) -> None:
    content = await document(client)
    asked = [content["components"]["schemas"][name] for name in ("VerifyRequest", "PairRequest")]
    nullable = {}
    for item in content["paths"].values():
        for operation in item.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            asked.append(body.get("schema", {}))
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "query" and "default" not in parameter["schema"]:
                    nullable[f"{operation['operationId']}?{parameter['name']}"] = parameter
    for schema in asked:
        nullable |= {
            name: field for name, field in schema.get("properties", {}).items() if '"null"' in json.dumps(field)
        }
    assert {"momentum", "eps", "version", "max_batch_size", "probes", "architecture", "read_histogram?channel"} <= set(
        nullable
    )
    for name, field in nullable.items():
        assert re.search(r"\bnull\b|where not given|binary encodings only", field["description"]), name


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


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
async def test_the_pages_need_no_internet(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    assert answer.status_code == 200
    loaded = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert any(link.endswith(".js") for link in loaded)
    for link in loaded:
        assert not link.startswith(("http:", "https:", "//")), link
        assert (await client.get(link)).status_code == 200, link


async def test_the_bare_address_leads_to_the_documentation(client: httpx.AsyncClient) -> None:
    answer = await client.get("/", follow_redirects=True)
    assert answer.url.path == "/docs"
    assert answer.status_code == 200


async def test_info_names_versions_and_limits(client: httpx.AsyncClient) -> None:
    info = (await client.get("/v1/info")).json()
    assert info["name"] == "normserve"
    assert set(info["libraries"]) == {"torch", "onnx", "onnxruntime"}
    assert info["threads"] >= 1
    assert info["normalization_device"] == "cpu"
    assert info["limits"]["max_body_bytes"] == 1_000_000


async def test_every_number_of_a_request_has_its_least_value(client: httpx.AsyncClient) -> None:
    """But axes, of which negative ones count from the back, and sizes that the input decides."""
    content = await document(client)
    unbounded = {
        f"{operation['operationId']}?{parameter['name']}"
        for item in content["paths"].values()
        for operation in item.values()
        for parameter in operation.get("parameters", ())
        if parameter["schema"].get("type") in ("integer", "number")
        and not {"minimum", "exclusiveMinimum"} & parameter["schema"].keys()
        and not parameter["name"].endswith("axis")
    }
    assert unbounded == set()


async def test_every_error_answer_is_listed_where_it_may_come(client: httpx.AsyncClient) -> None:
    """All other tests hold the errors they meet against the document, by a hook of the client."""
    paths = (await document(client))["paths"]
    infer = paths["/v2/models/{name}/infer"]["post"]["responses"]
    assert infer["400"]["description"] == (
        "`dtype_mismatch`, `parameter_invalid`, `payload_malformed`, `shape_mismatch`, `statistics_invalid`"
    )
    assert infer["503"]["description"] == "`model_not_ready`, `shutting_down`"
    assert set(paths["/v1/info"]["get"]["responses"]) == {"200", "403", "500", "default"}
    listed = {
        code
        for item in paths.values()
        for operation in item.values()
        for response in operation["responses"].values()
        for code in re.findall(r"`(\w+)`", response["description"])
    }
    assert {row.code for row in TABLE.values()} <= listed
