"""POST /v1/statistics/{id}/batches: every encoding counts the same, and whatever is refused changes nothing."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests.service.conftest import http, running_app, small_settings
from tests.service.statistics import NPY, Array, created, encodings, npy, pooled, protocol

pytestmark = pytest.mark.asyncio(loop_scope="session")

ARRAY: Array = np.random.default_rng(0).normal(3, 2, (6, 3, 4)).astype(np.float32)
ENCODINGS = encodings(ARRAY)
COUNTED = np.array([True, True, False, True, False, True])


def assert_pooled(document: dict[str, Any], array: Array, *, rtol: float = 1e-12) -> None:
    mean, var = pooled(array)
    found = document["statistics"]["pooled"]
    assert document["count"] == array.size // array.shape[1]
    np.testing.assert_allclose(found["mean"], mean, rtol=rtol)
    np.testing.assert_allclose(found["var_biased"], var, rtol=rtol)


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_every_encoding_counts_the_same(client: httpx.AsyncClient, encoding: str) -> None:
    path = await created(client)
    answer = await client.post(f"{path}/batches", **ENCODINGS[encoding])
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "statistics": path.rpartition("/")[2],
        "sequence": 1,
        "counted": True,
        "count": 24,
        "batches": 1,
    }
    assert_pooled((await client.get(path)).json(), ARRAY)


@pytest.mark.parametrize("encoding", ["json", "npz", "safetensors"])
async def test_a_mask_says_what_counts(client: httpx.AsyncClient, encoding: str) -> None:
    path = await created(client)
    tensors = {"input": ARRAY, "mask": COUNTED[:, None]}
    zipped = io.BytesIO()
    np.savez(zipped, allow_pickle=False, **tensors)
    requests: dict[str, dict[str, Any]] = {
        "json": {"json": {name: array.tolist() for name, array in tensors.items()}},
        "npz": {"content": zipped.getvalue(), "headers": {"content-type": "application/x-npz"}},
        "safetensors": {
            "content": safetensors.save(tensors),
            "headers": {"content-type": "application/vnd.safetensors"},
        },
    }
    answer = await client.post(f"{path}/batches", **requests[encoding])
    assert (answer.status_code, answer.json()["count"]) == (200, 16), answer.text
    assert_pooled((await client.get(path)).json(), ARRAY[COUNTED])


async def test_moments_of_a_worker_are_exact_to_the_last_bit(client: httpx.AsyncClient) -> None:
    path = await created(client, 2)
    moments = {"count": 2**40 + 1, "mean": [0.1, 1e300], "m2": [0.3, 0.0]}
    answer = await client.post(f"{path}/batches", json=moments)
    assert (answer.status_code, answer.json()["count"]) == (200, 2**40 + 1), answer.text
    found = (await client.get(path)).json()["statistics"]["pooled"]
    assert found["mean"] == moments["mean"]
    assert found["var_unbiased"] == [0.3 / 2**40, 0.0]
    answer = await client.post(f"{path}/batches", json={"count": [0, 3], "mean": [5, 1e300], "m2": [0, 0]})
    assert answer.json()["count"] == [2**40 + 1, 2**40 + 4]


async def test_moments_and_the_tensors_they_are_of_agree(client: httpx.AsyncClient) -> None:
    by_tensor, by_moments = await created(client), await created(client)
    await client.post(f"{by_tensor}/batches", **ENCODINGS["npy"])
    wide = ARRAY.astype(float).transpose(1, 0, 2).reshape(3, -1)
    tensors = {"count": np.array(24), "mean": wide.mean(1), "m2": wide.var(1) * 24}
    headers = {"content-type": "application/vnd.safetensors"}
    answer = await client.post(f"{by_moments}/batches", content=safetensors.save(tensors), headers=headers)
    assert answer.status_code == 200, answer.text
    documents = [(await client.get(path)).json() for path in (by_tensor, by_moments)]
    for definition, values in documents[0]["statistics"].items():
        for name, value in values.items():
            np.testing.assert_allclose(documents[1]["statistics"][definition][name], value, rtol=1e-12)


async def test_an_empty_batch_and_a_skipped_one_change_nothing(client: httpx.AsyncClient) -> None:
    path = await created(client)
    await client.post(f"{path}/batches", **ENCODINGS["npy"])
    before = await client.get(path)
    empty = await client.post(f"{path}/batches", content=npy(ARRAY[:0]), headers=NPY)
    bad = ARRAY.copy()
    bad[2, 1, 0] = np.inf
    skipped = await client.post(f"{path}/batches?nan_policy=skip_update", content=npy(bad), headers=NPY)
    for answer in (empty, skipped):
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "statistics": path.rpartition("/")[2],
            "sequence": 1,
            "counted": False,
            "count": 24,
            "batches": 1,
        }
        assert answer.headers["etag"] == before.headers["etag"]
    assert (await client.get(path)).json() == before.json()


async def test_values_that_are_not_finite_are_refused_unless_they_shall_propagate(client: httpx.AsyncClient) -> None:
    path = await created(client)
    for policy in ("", "?nan_policy=raise"):
        answer = await client.post(f"{path}/batches{policy}", json={"input": [[1, "NaN", 3], [1, 2, 3]]})
        assert (answer.status_code, answer.json()["code"]) == (422, "statistics_invalid")
        answer = await client.post(
            f"{path}/batches{policy}", json={"count": 2, "mean": [1, "Infinity", 3], "m2": [0] * 3}
        )
        assert (answer.status_code, answer.json()["code"]) == (422, "statistics_invalid")
    assert (await client.get(path)).json()["batches"] == 0
    answer = await client.post(f"{path}/batches?nan_policy=propagate", json={"input": [[1, "NaN", 3], [1, 2, 3]]})
    assert answer.status_code == 200
    found = (await client.get(path)).json()["statistics"]
    for definition in found.values():
        assert [values[1] for values in definition.values()] == ["NaN"] * len(definition)
        assert "NaN" not in [value for values in definition.values() for value in (values[0], values[2])]


HEAD = npy(ARRAY)[:128]
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "channels": ({"json": {"input": [[1, 2], [3, 4]]}}, 422, "shape_mismatch"),
    "channels npy": ({"content": npy(ARRAY[:, :2]), "headers": NPY}, 422, "shape_mismatch"),
    "channels moments": ({"json": {"count": 2, "mean": [1, 2], "m2": [1, 2]}}, 422, "shape_mismatch"),
    "rank": ({"json": {"input": [1, 2, 3]}}, 422, "shape_mismatch"),
    "rank npy": ({"content": npy(ARRAY[0, :, 0]), "headers": NPY}, 422, "shape_mismatch"),
    "count negative": ({"json": {"count": -1, "mean": [1] * 3, "m2": [1] * 3}}, 422, "statistics_invalid"),
    "count broken": ({"json": {"count": 1.5, "mean": [1] * 3, "m2": [1] * 3}}, 422, "statistics_invalid"),
    "count too large": ({"json": {"count": 1e300, "mean": [1] * 3, "m2": [1] * 3}}, 422, "statistics_invalid"),
    "count NaN": ({"json": {"count": "NaN", "mean": [1] * 3, "m2": [1] * 3}}, 422, "statistics_invalid"),
    "count bool": ({"json": {"count": True, "mean": [1] * 3, "m2": [0] * 3}}, 422, "dtype_mismatch"),
    "count shape": ({"json": {"count": [2, 2], "mean": [1] * 3, "m2": [1] * 3}}, 422, "shape_mismatch"),
    "mean integers": (
        {
            "content": safetensors.save({"count": np.array(2), "mean": np.full(3, 2**60), "m2": np.ones(3)}),
            "headers": {"content-type": "application/vnd.safetensors"},
        },
        422,
        "statistics_invalid",
    ),
    "m2 negative": ({"json": {"count": 2, "mean": [1] * 3, "m2": [1, 1, -1]}}, 422, "statistics_invalid"),
    "m2 of one": ({"json": {"count": [2, 1, 2], "mean": [1] * 3, "m2": [1] * 3}}, 422, "statistics_invalid"),
    "m2 of none": ({"json": {"count": [0, 2, 2], "mean": [1] * 3, "m2": [1] * 3}}, 422, "statistics_invalid"),
    "m2 shape": ({"json": {"count": 2, "mean": [1] * 3, "m2": [1] * 2}}, 422, "shape_mismatch"),
    "mean scalar": ({"json": {"count": 2, "mean": 1, "m2": 1}}, 422, "shape_mismatch"),
    "moments missing": ({"json": {"count": 2, "mean": [1] * 3}}, 422, "parameter_invalid"),
    "both": ({"json": {"input": [[1] * 3], "count": 2, "mean": [1] * 3, "m2": [1] * 3}}, 422, "parameter_invalid"),
    "mask alone": ({"json": {"mask": [True]}}, 422, "parameter_invalid"),
    "mask shape": ({"json": {"input": [[1] * 3], "mask": [True, False]}}, 422, "shape_mismatch"),
    "mask type": ({"json": {"input": [[1] * 3], "mask": [1]}}, 422, "dtype_mismatch"),
    "nothing": ({"json": {}}, 422, "parameter_invalid"),
    "empty": ({"content": b""}, 400, "payload_malformed"),
    "unknown field": ({"json": {"input": [[1] * 3], "momentum": 0.1}}, 422, "parameter_invalid"),
    "outputs": ({"json": {"input": [[1] * 3], "outputs": ["mean"]}}, 422, "parameter_invalid"),
    "unknown tensor": (
        {"content": safetensors.save({"x": ARRAY}), "headers": {"content-type": "application/vnd.safetensors"}},
        400,
        "payload_malformed",
    ),
    "list": ({"json": [[1, 2, 3]]}, 400, "payload_malformed"),
    "not JSON": ({"content": b"{"}, 400, "payload_malformed"),
    "ragged": ({"json": {"input": [[1, 2, 3], [1, 2]]}}, 400, "payload_malformed"),
    "npy empty": ({"content": b"", "headers": NPY}, 400, "payload_malformed"),
    "npy magic": ({"content": b"\x93NUMPZ" + bytes(200), "headers": NPY}, 400, "payload_malformed"),
    "npy head cut": ({"content": HEAD[:50], "headers": NPY}, 400, "payload_malformed"),
    "npy no data": ({"content": HEAD, "headers": NPY}, 400, "payload_malformed"),
    "npy short": ({"content": npy(ARRAY)[:-1], "headers": NPY}, 400, "payload_malformed"),
    "npy long": ({"content": npy(ARRAY) + b"\0", "headers": NPY}, 400, "payload_malformed"),
    "npy object": ({"content": npy(np.array([[1, 2, 3]], "<c8")), "headers": NPY}, 400, "payload_malformed"),
    "npy bool": (
        {"content": npy(np.ones((1, 3), bool)).replace(b"\1\1\1", b"\1\2\1"), "headers": NPY},
        400,
        "payload_malformed",
    ),
    "protocol short": (protocol(ARRAY, shape=[7, 3, 4]), 400, "payload_malformed"),
    "protocol name": (protocol(ARRAY, name="x"), 400, "payload_malformed"),
    "protocol datatype": (protocol(ARRAY, datatype="FP31"), 400, "payload_malformed"),
    "protocol BYTES": (protocol(ARRAY, datatype="BYTES"), 400, "payload_malformed"),
    "protocol no size": (protocol(ARRAY, parameters={}), 400, "payload_malformed"),
    "protocol shape": (protocol(ARRAY, shape=[-1, 3]), 400, "payload_malformed"),
    "protocol header": (
        {"content": b"", "headers": {"inference-header-content-length": "many"}},
        422,
        "parameter_invalid",
    ),
    "protocol long header": (
        {"content": b"{}", "headers": {"inference-header-content-length": "70000"}},
        413,
        "payload_too_large",
    ),
    "integers": ({"content": npy(np.full((1, 3), 2**60)), "headers": NPY}, 422, "statistics_invalid"),
    "media type": ({"content": b"1", "headers": {"content-type": "text/plain"}}, 415, "media_type_unsupported"),
    "compressed": (
        {"content": npy(ARRAY), "headers": NPY | {"content-encoding": "gzip"}},
        415,
        "media_type_unsupported",
    ),
    "policy": ({"json": {"input": [[1] * 3]}, "params": {"nan_policy": "ignore"}}, 422, "parameter_invalid"),
    "policies": (
        {"json": {"input": [[1] * 3]}, "params": {"nan_policy": ["raise", "propagate"]}},
        422,
        "parameter_invalid",
    ),
    "npy mask": ({"content": npy(ARRAY), "headers": NPY, "params": {"mask": "[true]"}}, 422, "parameter_invalid"),
    "query": ({"json": {"input": [[1] * 3]}, "params": {"momentum": "1"}}, 422, "parameter_invalid"),
    "key long": ({"json": {"input": [[1] * 3]}, "headers": {"idempotency-key": "k" * 256}}, 422, "parameter_invalid"),
    "key empty": ({"json": {"input": [[1] * 3]}, "headers": {"idempotency-key": ""}}, 422, "parameter_invalid"),
    "key bytes": ({"json": {"input": [[1] * 3]}, "headers": {"idempotency-key": b"\xff"}}, 422, "parameter_invalid"),
    "large": (
        {"content": bytes(1_000_001), "headers": {"content-type": "application/x-npz"}},
        413,
        "payload_too_large",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_refused_changes_nothing(client: httpx.AsyncClient, case: str) -> None:
    request, status, code = REFUSED[case]
    path = await created(client)
    await client.post(f"{path}/batches", **ENCODINGS["npy"])
    before = await client.get(path)
    answer = await client.post(f"{path}/batches", **request)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    after = await client.get(path)
    assert (after.json(), after.headers["etag"]) == (before.json(), before.headers["etag"])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"json": {"count": [2, 2], "mean": [1] * 3, "m2": [1] * 3}}, "count: expected one value for each of 3"),
        ({"json": {"count": 2, "mean": [[1] * 3], "m2": [1] * 3}}, "mean: expected one value for each of 3"),
        ({"content": npy(np.full((1, 3), 2**60)), "headers": NPY}, "input: expected int64 within"),
        ({"json": {"input": [[1, 2, "NaN"]]}}, "in channel 2"),
        ({"json": {"input": [[1] * 3]}, "headers": {"if-match": "1"}}, "If-Match: expected"),
    ],
    ids=str,
)
async def test_a_refusal_names_what_the_caller_sent(
    client: httpx.AsyncClient, request_: dict[str, Any], words: str
) -> None:
    answer = await client.post(f"{await created(client)}/batches", **request_)
    assert words in answer.json()["error"]


async def test_a_mask_beside_a_stream_is_told_where_to_go(client: httpx.AsyncClient) -> None:
    path = await created(client)
    entry = {"shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}}
    head = json.dumps({"inputs": [{"name": name, **entry} for name in ("input", "mask")]}).encode()
    requests: tuple[dict[str, Any], ...] = (
        {"content": head + bytes(48), "headers": {"inference-header-content-length": str(len(head))}},
        {"content": npy(ARRAY), "headers": NPY, "params": {"mask": "1"}},
    )
    for request in requests:
        answer = await client.post(f"{path}/batches", **request)
        assert answer.status_code in (400, 422)
        assert "mask" in answer.json()["error"]
        assert "safetensors" in answer.json()["error"]


async def test_the_edges_of_a_key_are_taken(client: httpx.AsyncClient) -> None:
    path = await created(client)
    for key in ("k" * 255, "k", '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "a key"):
        answer = await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]}, headers={"idempotency-key": key})
        assert answer.status_code == 200, answer.text
    assert (await client.get(path)).json()["batches"] == 4


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_a_retry_counts_once_and_gets_the_same_answer(client: httpx.AsyncClient, encoding: str) -> None:
    path = await created(client)
    request = dict(ENCODINGS[encoding])
    request["headers"] = {**request.get("headers", {}), "idempotency-key": "one"}
    first = await client.post(f"{path}/batches", **request)
    await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]})
    second = await client.post(f"{path}/batches", **request)
    assert second.json() == first.json()
    assert ("idempotent-replayed" in first.headers, second.headers["idempotent-replayed"]) == (False, "true")
    assert (await client.get(path)).json()["batches"] == 2


async def test_a_key_with_another_request_is_a_conflict(client: httpx.AsyncClient) -> None:
    path = await created(client)
    headers = {"idempotency-key": "one"}
    await client.post(f"{path}/batches", content=npy(ARRAY), headers=NPY | headers)
    before = (await client.get(path)).json()
    other = ARRAY.copy()
    other[[0, 1]] = other[[1, 0]]  # the same moments
    for request in (
        {"content": npy(other)},
        {"content": npy(ARRAY), "params": {"nan_policy": "skip_update"}},
        {"content": npy(ARRAY.reshape(4, 3, 6))},
    ):
        answer = await client.post(f"{path}/batches", **request, headers=NPY | headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict"), answer.text
    assert (await client.get(path)).json() == before
    elsewhere = await created(client)
    answer = await client.post(f"{elsewhere}/batches", content=npy(other), headers=NPY | headers)
    assert answer.status_code == 200, "a key belongs to its resource"


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_a_key_with_other_values_is_a_conflict_in_every_encoding(
    client: httpx.AsyncClient, encoding: str
) -> None:
    path = await created(client)
    other = ARRAY[::-1].copy()  # the same moments
    statuses = []
    for request in (ENCODINGS[encoding], encodings(other)[encoding]):
        headers = request.get("headers", {}) | {"idempotency-key": "one"}
        statuses.append((await client.post(f"{path}/batches", **(request | {"headers": headers}))).status_code)
    assert statuses == [200, 409]


async def test_a_retry_of_a_conditional_post_is_answered(client: httpx.AsyncClient) -> None:
    path = await created(client)
    headers = {"idempotency-key": "one", "if-match": (await client.get(path)).headers["etag"]}
    answers = [await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]}, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()


async def test_a_refused_post_does_not_use_up_its_key(client: httpx.AsyncClient) -> None:
    path = await created(client)
    headers = {"idempotency-key": "one"}
    assert (await client.post(f"{path}/batches", json={"input": [[1, 2]]}, headers=headers)).status_code == 422
    assert (await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]}, headers=headers)).status_code == 200


async def test_concurrent_posts_lose_nothing_and_count_nothing_twice(client: httpx.AsyncClient) -> None:
    path = await created(client)
    arrays = [ARRAY + index for index in range(16)]

    async def post(index: int, key: str) -> httpx.Response:
        headers = NPY | {"idempotency-key": key}
        return await client.post(f"{path}/batches", content=npy(arrays[index]), headers=headers)

    tasks = [post(index, f"key {index}") for index in range(16) for _ in range(3)]
    answers = await asyncio.gather(*tasks)
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(answer.json()["sequence"] for answer in answers) == sorted([*range(1, 17)] * 3)
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 16
    document = (await client.get(path)).json()
    assert document["batches"] == 16
    assert_pooled(document, np.concatenate(arrays))


async def pieces(content: bytes, size: int, *, pause_s: float = 0) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        await asyncio.sleep(pause_s)
        yield content[start : start + size]


@pytest.mark.parametrize("encoding", ["npy", "npy fortran", "npy big-endian", "protocol"])
@pytest.mark.parametrize("size", [1, 7, 100])
async def test_a_stream_may_come_in_any_pieces(client: httpx.AsyncClient, encoding: str, size: int) -> None:
    path = await created(client)
    request = ENCODINGS[encoding]
    answer = await client.post(f"{path}/batches", content=pieces(request["content"], size), headers=request["headers"])
    assert answer.status_code == 200, answer.text
    assert_pooled((await client.get(path)).json(), ARRAY)


async def test_a_stream_may_be_larger_than_all_bodies_together(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, receive_budget_bytes=8_000_000, max_stream_bytes=10_000_000)
    array = np.random.default_rng(1).normal(size=(150, 64, 256)).astype(np.float32)
    async with running_app(settings) as app, http(app) as client:
        path = await created(client, 64)
        for request in ({"content": npy(array), "headers": NPY}, protocol(array)):
            answer = await client.post(f"{path}/batches", **request)
            assert answer.status_code == 200, answer.text
            assert_pooled((await client.get(path)).json(), array)
            await client.delete(path)
            path = await created(client, 64)
        too_large = npy(np.zeros((153, 64, 256), np.float32))
        for content in (too_large, pieces(too_large, 65_536)):
            answer = await client.post(f"{path}/batches", content=content, headers=NPY)
            assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
        assert (await client.get(path)).json()["count"] == 0


async def test_a_stalled_sender_is_given_up_and_changes_nothing(client: httpx.AsyncClient) -> None:
    path = await created(client)
    content = pieces(npy(ARRAY), 200, pause_s=1)
    answer = await client.post(f"{path}/batches", content=content, headers=NPY)
    assert (answer.status_code, answer.json()["code"]) == (408, "body_timeout")
    assert (await client.get(path)).json()["batches"] == 0


async def test_the_number_of_resources_is_bounded(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path, max_statistics=2)) as app, http(app) as client:
        first, _ = await created(client), await created(client)
        await client.post(f"{first}/batches", **ENCODINGS["npy"])
        for answer in (
            await client.post("/v1/statistics", json={"num_features": 1}),
            await client.post(f"{first}/freeze"),
            await client.post("/v1/statistics/merge", json={"ids": [first.rpartition("/")[2]]}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        await client.delete(first)
        await created(client)
