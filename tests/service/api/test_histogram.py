"""GET /v1/statistics/{id}/histogram: counts of what was posted, in whatever encoding and however split."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import http, running_app, small_settings
from tests.service.statistics import NPY, Array, created, encodings, npy

pytestmark = pytest.mark.asyncio(loop_scope="session")

ARRAY: Array = np.random.default_rng(3).normal([[[0.0], [5.0], [-3.0]]], 1, (40, 3, 8)).astype(np.float32)


async def histogram(client: httpx.AsyncClient, path: str, **query: Any) -> dict[str, Any]:
    answer = await client.get(f"{path}/histogram", params=query)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def assert_like_numpy(found: dict[str, Any], values: Array, *, bins: int) -> None:
    """Within what the answer itself says of its error."""
    counts, edges = np.histogram(values.astype(float), bins=bins)
    np.testing.assert_allclose(found["edges"], edges, rtol=1e-12, atol=1e-12)
    assert sum(found["counts"]) == pytest.approx(values.size)
    below = np.abs(np.cumsum(found["counts"]) - np.cumsum(counts)) / values.size
    assert below.max() <= found["error"] + 1e-12 < 0.05
    area = np.dot(found["density"], np.diff(found["edges"]))
    assert area == pytest.approx(1)


@pytest.mark.parametrize("encoding", encodings(ARRAY))
async def test_it_is_numpys_of_all_values_and_of_a_channel(client: httpx.AsyncClient, encoding: str) -> None:
    path = await created(client)
    assert (await client.post(f"{path}/batches", **encodings(ARRAY)[encoding])).status_code == 200
    assert_like_numpy(await histogram(client, path, bins=20), ARRAY, bins=20)
    for channel in range(3):
        found = await histogram(client, path, bins=10, channel=channel)
        assert found["channel"] == channel
        assert_like_numpy(found, ARRAY[:, channel], bins=10)


async def test_batches_copies_and_merges_hold_the_values_of_all(client: httpx.AsyncClient) -> None:
    parts = [await created(client) for _ in range(2)]
    for index in range(4):
        content = npy(ARRAY[10 * index : 10 * index + 10])
        await client.post(f"{parts[index % 2]}/batches", content=content, headers=NPY)
    ids = [path.rpartition("/")[2] for path in parts]
    merged = (await client.post("/v1/statistics/merge", json={"ids": ids})).headers["location"]
    frozen = (await client.post(f"{merged}/freeze")).headers["location"]
    for path in (merged, frozen):
        assert_like_numpy(await histogram(client, path, bins=16, channel=1), ARRAY[:, 1], bins=16)


async def test_a_mask_leaves_values_out(client: httpx.AsyncClient) -> None:
    path = await created(client)
    mask = np.arange(40)[:, None] % 3 == 0
    document = {"input": ARRAY.tolist(), "mask": mask.tolist()}
    assert (await client.post(f"{path}/batches", json=document)).status_code == 200
    assert_like_numpy(await histogram(client, path, bins=5, channel=2), ARRAY[mask[:, 0], 2], bins=5)


async def test_values_that_are_not_finite_are_counted_apart(client: httpx.AsyncClient) -> None:
    path = await created(client, 1)
    content = {"input": [[1], [2], ["NaN"], ["Infinity"]]}
    await client.post(f"{path}/batches?nan_policy=propagate", json=content)
    await client.post(f"{path}/batches?nan_policy=skip_update", json=content)
    found = await histogram(client, path, bins=2)
    assert (found["counts"], found["non_finite"]) == ([1.0, 1.0], 2)


async def test_of_a_large_batch_an_even_sample_counts(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, histogram_values=1000, receive_budget_bytes=9_000_000)
    array = np.random.default_rng(4).normal(size=(64, 3, 100)).astype(np.float32)
    array[:, 1] += 10
    wide = np.random.default_rng(4).normal(size=(64, 300, 8)).astype(np.float32)
    async with running_app(settings) as app, http(app) as client:
        for encoding in ("npy", "npy fortran", "npz"):
            path = await created(client)
            assert (await client.post(f"{path}/batches", **encodings(array)[encoding])).status_code == 200
            assert (await client.get(path)).json()["count"] == 6400
            for channel in range(3):
                found = await histogram(client, path, bins=4, channel=channel)
                assert 250 <= sum(found["counts"]) <= 350
                assert min(found["edges"]) > 5 if channel == 1 else max(found["edges"]) < 5
        path = await created(client, 300)
        assert (await client.post(f"{path}/batches", **encodings(wide)["npy"])).status_code == 200
        assert 500 <= sum((await histogram(client, path))["counts"]) <= 1000
        refused = await client.get(f"{path}/histogram", params={"channel": 0})
        assert (refused.status_code, refused.json()["code"]) == (422, "parameter_invalid")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"bins": 0}, "parameter_invalid"),
        ({"bins": 1001}, "parameter_invalid"),
        ({"bins": "many"}, "parameter_invalid"),
        ({"channel": 3}, "parameter_invalid"),
        ({"channel": -1}, "parameter_invalid"),
        ({"bins": 10**30}, "parameter_invalid"),
    ],
    ids=str,
)
async def test_what_is_not_there_is_refused(client: httpx.AsyncClient, query: dict[str, Any], code: str) -> None:
    path = await created(client)
    await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]})
    answer = await client.get(f"{path}/histogram", params=query)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert (await histogram(client, path, bins=1000))["counts"]


async def test_without_values_there_is_none(client: httpx.AsyncClient) -> None:
    path = await created(client)
    await client.post(f"{path}/batches", json={"count": 5, "mean": [1, 2, 3], "m2": [1, 1, 1]})
    answer = await client.get(f"{path}/histogram")
    assert (answer.status_code, answer.json()["code"]) == (422, "statistics_invalid")
    assert (await client.get("/v1/statistics/nothing/histogram")).status_code == 404
