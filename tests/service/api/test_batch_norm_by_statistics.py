"""batch_norm by the statistics of a resource: the same numbers on both surfaces, and every misuse refused."""

import math
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.service.edges import of, post
from tests.service.statistics import NPY, Array, created, npy

pytestmark = pytest.mark.asyncio(loop_scope="session")

GENERATOR = np.random.default_rng(8)
BATCHES = [GENERATOR.normal(index, 3, (5 + index, 3, 4)).astype(np.float32).astype(float) for index in range(3)]
INPUT: Array = GENERATOR.normal(2, 5, (4, 3, 2))
TENSOR = of(INPUT.reshape(-1).tolist(), *INPUT.shape, datatype="FP64")


async def frozen(client: httpx.AsyncClient, **options: Any) -> str:
    path = await created(client, **options)
    for batch in BATCHES:
        assert (await client.post(f"{path}/batches", json={"input": batch.tolist()})).status_code == 200
    return str((await client.post(f"{path}/freeze")).json()["id"])


def values(answers: tuple[httpx.Response, ...], name: str = "output") -> list[Array]:
    """One output as both surfaces answer it."""
    own, protocol = answers
    assert (own.status_code, protocol.status_code) == (200, 200), (own.text, protocol.text)
    second = {item["name"]: item["data"] for item in protocol.json()["outputs"]}
    return [np.array(own.json()["outputs"][name]["data"]), np.array(second[name])]


def refusals(answers: tuple[httpx.Response, ...]) -> list[tuple[int, str]]:
    return [(answer.status_code, answer.json()["code"]) for answer in answers]


@pytest.mark.parametrize(
    ("definition", "mean", "var"),
    [
        (None, ("pooled", "mean"), ("pooled", "var_biased")),
        ("pooled", ("pooled", "mean"), ("pooled", "var_biased")),
        ("pooled_unbiased", ("pooled", "mean"), ("pooled", "var_unbiased")),
        ("paper", ("paper", "mean"), ("paper", "var")),
        ("ema", ("ema", "mean"), ("ema", "var")),
        ("ema_debiased", ("ema_debiased", "mean"), ("ema_debiased", "var")),
    ],
    ids=str,
)
async def test_the_definition_says_which_mean_and_variance(
    client: httpx.AsyncClient, definition: str | None, mean: tuple[str, str], var: tuple[str, str]
) -> None:
    statistics = await frozen(client)
    found = (await client.get(f"/v1/statistics/{statistics}")).json()["statistics"]
    running_mean, running_var = [torch.tensor(found[name][key], dtype=torch.float64) for name, key in (mean, var)]
    expected = functional.batch_norm(torch.from_numpy(INPUT), running_mean, running_var, eps=1e-5)
    request = {"input": TENSOR, "statistics": statistics, "training": False}
    request |= {} if definition is None else {"definition": definition}
    for _ in range(2):  # from the database, and from memory
        for output in values(await post(client, "batch_norm", request)):
            np.testing.assert_allclose(output, expected.flatten(), rtol=1e-12, atol=1e-12)


async def test_pooled_statistics_standardize_what_they_were_pooled_from(client: httpx.AsyncClient) -> None:
    statistics = await frozen(client)
    together = np.concatenate(BATCHES)
    tensor = of(together.reshape(-1).tolist(), *together.shape, datatype="FP64")
    for output in values(await post(client, "batch_norm", {"input": tensor, "statistics": statistics, "eps": 0})):
        channels = output.reshape(together.shape)
        np.testing.assert_allclose(channels.mean((0, 2)), 0, atol=1e-12)
        np.testing.assert_allclose(channels.var((0, 2)), 1, rtol=1e-6)


async def test_inverse_undoes_it(client: httpx.AsyncClient) -> None:
    request = {"statistics": await frozen(client), "weight": of([2, 3, 4]), "bias": of([1, 0, 5])}
    forth = values(await post(client, "batch_norm", request | {"input": TENSOR}))[0]
    back = request | {"input": of(forth.tolist(), *INPUT.shape, datatype="FP64"), "inverse": True}
    for output in values(await post(client, "batch_norm", back)):
        np.testing.assert_allclose(output, INPUT.reshape(-1), rtol=1e-12)


async def test_binary_bodies_name_it_in_the_query(client: httpx.AsyncClient) -> None:
    statistics = await frozen(client)
    url = f"/v1/normalizations/batch_norm?statistics={statistics}&definition=paper"
    answer = await client.post(url, content=npy(INPUT), headers=NPY)
    request = {"input": TENSOR, "statistics": statistics, "definition": "paper"}
    expected = values(await post(client, "batch_norm", request))[0]
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(np.frombuffer(answer.content[-INPUT.nbytes :]), expected)


async def test_an_open_resource_answers_as_of_now(client: httpx.AsyncClient) -> None:
    path = await created(client)
    request = {"input": TENSOR, "statistics": path.rpartition("/")[2], "outputs": ["mean"]}
    for count, batch in enumerate(BATCHES, 1):
        await client.post(f"{path}/batches", json={"input": batch.tolist()})
        expected = np.concatenate(BATCHES[:count]).mean((0, 2))
        for mean in values(await post(client, "batch_norm", request), "mean"):
            np.testing.assert_allclose(mean, expected, rtol=1e-6)


async def test_deleted_statistics_are_unknown_even_where_they_were_remembered(client: httpx.AsyncClient) -> None:
    statistics = await frozen(client)
    request = {"input": TENSOR, "statistics": statistics}
    values(await post(client, "batch_norm", request))
    await client.delete(f"/v1/statistics/{statistics}")
    assert refusals(await post(client, "batch_norm", request)) == [(404, "statistics_not_found")] * 2


async def test_more_frozen_statistics_than_are_remembered_answer_each_for_itself(client: httpx.AsyncClient) -> None:
    identities = []
    for index in range(70):
        path = await created(client, 1)
        await client.post(f"{path}/batches", json={"count": 2, "mean": [index], "m2": [2]})
        identities.append((await client.post(f"{path}/freeze")).json()["id"])
    for _ in range(2):
        for index, statistics in enumerate(identities):
            document = {"input": [[index + 1]], "statistics": statistics, "eps": 0, "outputs": ["output"]}
            answer = await client.post("/v1/normalizations/batch_norm", json=document)
            assert answer.json()["outputs"]["output"]["data"] == [1.0]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"statistics": "nothing"}, 404, "statistics_not_found"),
        ({"statistics": "x" * 10_000}, 404, "statistics_not_found"),
        ({"statistics": 5}, 422, "parameter_invalid"),
        ({"definition": "mean"}, 422, "parameter_invalid"),
        ({"definition": None}, 422, "parameter_invalid"),
        ({"definition": "ema", "statistics": None}, 422, "parameter_invalid"),
        ({"training": True}, 422, "parameter_invalid"),
        ({"running_mean": of([0, 0, 0]), "running_var": of([1, 1, 1])}, 422, "parameter_invalid"),
        ({"running_mean": of([0, 0, 0])}, 422, "parameter_invalid"),
        ({"input": of([1, 2, 3, 4], 2, 2)}, 422, "shape_mismatch"),
        ({"channel_axis": 2}, 422, "shape_mismatch"),
        ({"channel_axis": 7}, 422, "parameter_invalid"),
        ({"input": of([math.pi])}, 422, "shape_mismatch"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
async def test_misuse_is_refused_on_both_surfaces(
    client: httpx.AsyncClient, change: dict[str, Any], status: int, code: str
) -> None:
    request = {"input": TENSOR, "statistics": await frozen(client)} | change
    statuses = [status, 400 if status == 422 else status]
    assert refusals(await post(client, "batch_norm", request)) == [(each, code) for each in statuses]


async def test_statistics_that_lack_the_definition_are_refused(client: httpx.AsyncClient) -> None:
    path = await created(client)
    code = "statistics_invalid"
    request = {"input": TENSOR, "statistics": path.rpartition("/")[2]}
    assert refusals(await post(client, "batch_norm", request)) == [
        (422, "statistics_invalid"),
        (400, "statistics_invalid"),
    ]
    await client.post(f"{path}/batches", json={"input": [[1, 2, 3]]})
    values(await post(client, "batch_norm", request))
    for definition in ("paper", "pooled_unbiased", "ema_debiased"):
        found = refusals(await post(client, "batch_norm", request | {"definition": definition}))
        assert found[0] == (422, code), definition
    merged = await client.post("/v1/statistics/merge", json={"ids": [path.rpartition("/")[2]]})
    request = {"input": TENSOR, "statistics": merged.json()["id"], "definition": "ema"}
    assert refusals(await post(client, "batch_norm", request))[0] == (422, code)


async def test_the_parameters_are_described(client: httpx.AsyncClient) -> None:
    described = (await client.get("/v1/normalizations/batch_norm")).json()["parameters"]
    own = {parameter["name"]: parameter for parameter in described}
    assert own["statistics"]["description"]
    assert own["definition"]["default"] == "pooled"
    operation = (await client.get("/openapi.json")).json()["paths"]["/v1/normalizations/batch_norm"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert schema["statistics"]["type"] == ["string", "null"]
    assert schema["definition"]["enum"] == own["definition"]["choices"]


async def test_other_methods_know_no_statistics(client: httpx.AsyncClient) -> None:
    answers = await post(client, "lp_norm", {"input": TENSOR, "statistics": "x"})
    assert refusals(answers) == [(422, "parameter_invalid"), (400, "parameter_invalid")]
