"""/v1/statistics: what a resource holds, and what its life is."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.service.statistics import NPY, created, npy, pooled

pytestmark = pytest.mark.asyncio(loop_scope="session")


def batches(count: int, channels: int = 3) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(5)
    return [generator.normal(index, 2, (4 + index, channels, 5)).astype(np.float32) for index in range(count)]


async def post_all(client: httpx.AsyncClient, path: str, arrays: list[np.ndarray[Any, Any]]) -> None:
    for array in arrays:
        answer = await client.post(f"{path}/batches", content=npy(array), headers=NPY)
        assert answer.status_code == 200, answer.text


async def test_a_new_resource_is_described(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/statistics", json={"num_features": 2, "name": "stem", "convention": "onnx"})
    document = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/statistics/{document['id']}"
    assert document | {"id": "", "created_at": "", "explanation": ""} == {
        "id": "",
        "name": "stem",
        "num_features": 2,
        "channel_axis": 1,
        "momentum": 0.9,
        "convention": "onnx",
        "created_at": "",
        "frozen": False,
        "sequence": 0,
        "batches": 0,
        "content_hash": None,
        "sources": [],
        "count": 0,
        "statistics": {
            "pooled": {key: ["NaN", "NaN"] for key in ("mean", "var_biased", "var_unbiased")},
            "paper": {"mean": ["NaN", "NaN"], "var": ["NaN", "NaN"]},
            "ema": {"mean": [0.0, 0.0], "var": [1.0, 1.0]},
            "ema_debiased": {"mean": ["NaN", "NaN"], "var": ["NaN", "NaN"]},
        },
        "explanation": "",
    }
    read = await client.get(answer.headers["location"])
    assert (read.json(), read.headers["etag"]) == (document, answer.headers["etag"])


async def test_the_answer_says_how_the_definitions_differ(client: httpx.AsyncClient) -> None:
    path = await created(client, 1)
    await post_all(client, path, [np.array([[-1.0], [1.0]]), np.array([[3.0], [5.0]])])
    answers = [await client.get(path), await client.post(f"{path}/freeze")]
    for answer in answers:
        sentence = answer.json()["explanation"]
        assert "\n" not in sentence
        assert "5 = 1 + 4" in sentence


@pytest.mark.parametrize("momentum", [0.3, None], ids=["exponential", "cumulative"])
async def test_every_definition_is_torchs(client: httpx.AsyncClient, momentum: float | None) -> None:
    path = await created(client, momentum=momentum)
    arrays = batches(4)
    await post_all(client, path, arrays)
    document = (await client.get(path)).json()
    layer, average = (torch.nn.BatchNorm1d(3, momentum=value, dtype=torch.float64) for value in (momentum, None))
    for array in arrays:
        layer(torch.from_numpy(array).double())
        average(torch.from_numpy(array).double())
    together = torch.cat([torch.from_numpy(array).double().transpose(0, 1).flatten(1) for array in arrays], 1)
    found = document["statistics"]
    assert (document["count"], document["batches"], document["sequence"]) == (together.shape[1], 4, 4)
    np.testing.assert_allclose(found["pooled"]["mean"], together.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found["pooled"]["var_biased"], together.var(1, correction=0), rtol=1e-12)
    np.testing.assert_allclose(found["pooled"]["var_unbiased"], together.var(1), rtol=1e-12)
    for name, reference in (("ema", layer), ("paper", average)):
        assert reference.running_mean is not None
        assert reference.running_var is not None
        np.testing.assert_allclose(found[name]["mean"], reference.running_mean.numpy(), rtol=1e-12)
        np.testing.assert_allclose(found[name]["var"], reference.running_var.numpy(), rtol=1e-12)


async def test_a_frozen_copy_never_changes_and_its_source_stays_open(client: httpx.AsyncClient) -> None:
    path = await created(client)
    await post_all(client, path, batches(2))
    source = (await client.get(path)).json()
    first, second = [await client.post(f"{path}/freeze") for _ in range(2)]
    assert [first.status_code, second.status_code] == [201, 201]
    frozen = first.json()
    assert frozen["frozen"]
    assert frozen["sources"] == [source["id"]]
    assert frozen["id"] not in (source["id"], second.json()["id"])
    assert frozen["content_hash"] == second.json()["content_hash"]
    assert len(bytes.fromhex(frozen["content_hash"])) == hashlib.sha256().digest_size
    assert frozen["statistics"] == source["statistics"]
    refused = await client.post(f"{first.headers['location']}/batches", json={"input": [[1, 2, 3]]})
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    await post_all(client, path, batches(1))
    assert (await client.get(first.headers["location"])).json() == frozen
    assert (await client.post(f"{path}/freeze")).json()["content_hash"] != frozen["content_hash"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b'{"name": "kept"}', 422, "name"),
        (b"[1]", 422, "object"),
        (b"kept", 400, "JSON"),
    ],
    ids=["field", "list", "text"],
)
async def test_freezing_takes_no_fields(client: httpx.AsyncClient, body: bytes, status: int, said: str) -> None:
    path = await created(client)
    await post_all(client, path, batches(1))
    before = (await client.get("/v1/statistics")).json()
    answer = await client.post(f"{path}/freeze", content=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert (await client.get("/v1/statistics")).json() == before
    assert (await client.post(f"{path}/freeze", content=b"{}")).status_code == 201


async def test_frozen_and_deleted_ones_are_refused_before_a_body_is_read(client: httpx.AsyncClient) -> None:
    path = await created(client)
    await post_all(client, path, batches(1))
    frozen = (await client.post(f"{path}/freeze")).headers["location"]
    await client.delete(path)
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(True)
        yield npy(batches(1)[0])

    answers = [await client.post(f"{closed}/batches", content=body(), headers=NPY) for closed in (frozen, path)]
    assert ([answer.status_code for answer in answers], read) == ([409, 404], [])


async def test_the_content_hash_tells_apart_all_that_counts(client: httpx.AsyncClient) -> None:
    array = np.array([[1.0], [3.0]])
    posts: list[dict[str, Any]] = [
        {"content": npy(array), "headers": NPY},
        {"json": {"count": 2, "mean": [2], "m2": [2]}},
    ]
    hashes = set()
    for request in posts:  # the same moments, with a histogram and without
        for axis in (1, -1):
            path = await created(client, 1, channel_axis=axis)
            await client.post(f"{path}/batches", **request)
            frozen = await client.post(f"{path}/freeze")
            assert frozen.headers["etag"] == f'"{frozen.json()["content_hash"]}"'
            hashes.add(frozen.json()["content_hash"])
    assert len(hashes) == 4


async def test_nothing_cannot_be_frozen(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{await created(client)}/freeze")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


async def test_merging_is_as_if_all_batches_had_come_to_one(client: httpx.AsyncClient) -> None:
    arrays = batches(6)
    whole, *parts = [await created(client) for _ in range(4)]
    await post_all(client, whole, arrays)
    for index, part in enumerate(parts):
        await post_all(client, part, arrays[2 * index : 2 * index + 2])
    ids = [part.rpartition("/")[2] for part in parts]
    answer = await client.post("/v1/statistics/merge", json={"ids": ids, "name": "all"})
    merged, expected = answer.json(), (await client.get(whole)).json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/statistics/{merged['id']}")
    assert (merged["name"], merged["sources"], merged["frozen"]) == ("all", ids, False)
    assert (merged["count"], merged["batches"]) == (expected["count"], expected["batches"])
    assert merged["statistics"]["ema"] is merged["statistics"]["ema_debiased"] is None
    for definition in ("pooled", "paper"):
        for name, values in expected["statistics"][definition].items():
            np.testing.assert_allclose(merged["statistics"][definition][name], values, rtol=1e-13)
    await post_all(client, answer.headers["location"], batches(1))
    assert (await client.get(answer.headers["location"])).json()["batches"] == 7


@pytest.mark.parametrize(
    ("make", "status", "code"),
    [
        (lambda ids: [ids[0], ids[0]], 422, "parameter_invalid"),
        (lambda ids: [ids[0], "nothing"], 404, "statistics_not_found"),
        (lambda ids: [ids[0], ids[1]], 422, "statistics_invalid"),
        (lambda ids: [ids[0], ids[2]], 422, "statistics_invalid"),
        (lambda ids: [ids[0], ids[3]], 422, "statistics_invalid"),
        (lambda _: [], 422, "parameter_invalid"),
        (lambda _: [1], 422, "parameter_invalid"),
        (lambda _: "all", 422, "parameter_invalid"),
    ],
    ids=["twice", "unknown", "channels", "axis", "convention", "none", "number", "text"],
)
async def test_what_does_not_merge_is_refused(client: httpx.AsyncClient, make: Any, status: int, code: str) -> None:
    options: list[dict[str, Any]] = [{}, {"num_features": 4}, {"channel_axis": 2}, {"convention": "keras"}]
    ids = [(await created(client, **option)).rpartition("/")[2] for option in options]
    answer = await client.post("/v1/statistics/merge", json={"ids": make(ids)})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


async def test_a_list_has_all_and_a_deleted_one_is_gone(client: httpx.AsyncClient) -> None:
    first, second = await created(client), await created(client)

    async def listed() -> list[str]:
        return [f"/v1/statistics/{item['id']}" for item in (await client.get("/v1/statistics")).json()["statistics"]]

    assert [path for path in await listed() if path in (first, second)] == [first, second]
    assert (await client.delete(first)).status_code == 204
    assert first not in await listed()
    for answer in (
        await client.get(first),
        await client.delete(first),
        await client.post(f"{first}/freeze"),
        await client.post(f"{first}/batches", json={"input": [[1, 2, 3]]}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "statistics_not_found")


async def test_the_etag_names_the_state(client: httpx.AsyncClient) -> None:
    path = await created(client)
    first = (await client.get(path)).headers["etag"]
    known = await client.get(path, headers={"if-none-match": f'"other", W/{first}'})
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", first)
    posted = await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]}, headers={"if-match": first})
    assert (posted.status_code, posted.headers["etag"]) == (200, (await client.get(path)).headers["etag"])
    assert posted.headers["etag"] != first
    assert (await client.get(path, headers={"if-none-match": first})).status_code == 200


@pytest.mark.parametrize("tags", ['"999"', 'W/"{current}"', '"a", "b"'], ids=["old", "weak", "several"])
async def test_a_change_of_another_state_is_refused(client: httpx.AsyncClient, tags: str) -> None:
    path = await created(client)
    await post_all(client, path, batches(1))
    before = await client.get(path)
    headers = {"if-match": tags.replace("{current}", before.headers["etag"].strip('"'))}
    for answer in (
        await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]}, headers=headers),
        await client.post(f"{path}/freeze", headers=headers),
        await client.delete(path, headers=headers),
    ):
        assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed"), answer.text
    assert (await client.get(path)).json() == before.json()
    for condition in ("*", f'"b" ,{before.headers["etag"]}'):
        assert (await client.post(f"{path}/freeze", headers={"if-match": condition})).status_code == 201


async def test_a_malformed_condition_is_refused(client: httpx.AsyncClient) -> None:
    path = await created(client)
    for headers in ({"if-match": "7"}, {"if-match": '"open'}, {"if-match": ""}):
        answer = await client.delete(path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "payload_malformed"), headers
    assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"num_features": 0},
        {"num_features": -1},
        {"num_features": 2.5},
        {"num_features": "3"},
        {"num_features": 65_537},
        {"num_features": 3, "name": ""},
        {"num_features": 3, "name": "n" * 129},
        {"num_features": 3, "momentum": 1.5},
        {"num_features": 3, "momentum": "NaN"},
        {"num_features": 3, "convention": "caffe"},
        {"num_features": 3, "channel_axis": 64},
        {"num_features": 3, "unknown": 1},
    ],
    ids=str,
)
async def test_a_malformed_request_makes_nothing(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    before = (await client.get("/v1/statistics")).json()
    answer = await client.post("/v1/statistics", json=document)
    assert (answer.status_code, answer.json()["code"]) == (422, "parameter_invalid")
    assert (await client.get("/v1/statistics")).json() == before


async def test_the_last_axis_may_be_the_channels(client: httpx.AsyncClient) -> None:
    path = await created(client, channel_axis=-1)
    array = np.random.default_rng(2).normal(size=(2, 7, 3))
    await post_all(client, path, [array, np.asfortranarray(array)])
    found = (await client.get(path)).json()["statistics"]["pooled"]
    mean, var = pooled(array, channel_axis=-1)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-13)
    np.testing.assert_allclose(found["var_biased"], var, rtol=1e-13)
