"""Serving options over HTTP: what is asked for shows, works, and is refused where it cannot be."""

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service import hostile
from tests.service.api.test_refusals import refused
from tests.service.engine import graphs

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def _serve(client: httpx.AsyncClient, name: str, content: bytes, **options: Any) -> httpx.Response:
    checkpoint = (await client.post("/v1/checkpoints", content=content)).json()["id"]
    return await client.post("/v1/models", json={"name": name, "checkpoint": checkpoint, "fold": False} | options)


async def _infer(client: httpx.AsyncClient, name: str, rows: Any, **parameters: Any) -> list[float]:
    x = np.asarray(rows, np.float32)
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.reshape(-1).tolist()}
    answer = await client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor], "parameters": parameters})
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["outputs"][0]["data"]
    return found


async def test_a_network_in_training_mode_is_refused_or_frozen(client: httpx.AsyncClient) -> None:
    content = hostile.training_norm()
    refused(await _serve(client, "training", content), 400, "checkpoint_invalid", "training mode", "freeze_training")
    answer = await _serve(client, "training", content, freeze_training=True, fold=True)
    assert answer.status_code == 201, answer.text
    assert answer.json()["fold"]["verdict"] == "equivalent"
    row, other = np.random.default_rng(0).standard_normal((2, 1, 3, 2, 2))
    alone = await _infer(client, "training", row, deterministic=True)
    for company in (other, 100 * other):
        together = await _infer(client, "training", np.concatenate([row, company]), deterministic=True)
        np.testing.assert_allclose(together[: len(alone)], alone, rtol=0, atol=8e-7 * max(map(abs, alone)))


async def test_options_show_and_batching_is_automatic_where_rows_are_apart(client: httpx.AsyncClient) -> None:
    answer = await _serve(
        client,
        "apart",
        graphs.doubling().SerializeToString(),
        max_queue_delay_us=100,
        instances=2,
        warmup=[{"x": [1, 3]}],
    )
    assert answer.status_code == 201, answer.text
    options = answer.json()["options"]
    assert (options["max_batch_size"], options["max_queue_delay_us"], options["instances"]) == (32, 100, 2)
    config = (await client.get("/v2/models/apart/config")).json()
    assert config["max_batch_size"] == 32
    assert config["input"][0]["dims"] == [3]
    answer = await _serve(client, "mixing", graphs.centered_over_the_batch().SerializeToString())
    assert answer.json()["options"]["max_batch_size"] == 0


async def test_requests_at_the_same_time_share_executions(client: httpx.AsyncClient) -> None:
    options = {"max_batch_size": 16, "max_queue_delay_us": 50_000}
    assert (await _serve(client, "shared", graphs.doubling().SerializeToString(), **options)).status_code == 201
    answers = await asyncio.gather(*(_infer(client, "shared", [[n, n, n]]) for n in range(48)))
    assert [answer[0] for answer in answers] == [2 * n for n in range(48)]
    (stats,) = (await client.get("/v2/models/shared/stats")).json()["model_stats"]
    assert stats["inference_count"] == 48
    assert stats["execution_count"] <= 16
    assert sum(entry["batch_size"] * entry["compute_infer"]["count"] for entry in stats["batch_stats"]) == 48


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"max_batch_size": -1}, 422, "max_batch_size"),
        ({"max_batch_size": 1.5}, 422, "max_batch_size"),
        ({"max_queue_delay_us": 10**9}, 422, "max_queue_delay_us"),
        ({"instances": 0}, 422, "instances"),
        ({"device": "cuda:9"}, 422, "device"),
        ({"device": "tpu"}, 422, "device"),
        ({"optimization": "most"}, 422, "optimization"),
        ({"warmup": [{"x": [1, 4]}]}, 400, "warmup"),
        ({"warmup": [{"y": [1, 3]}]}, 422, "warmup"),
        ({"warmup": [{"x": [-1, 3]}]}, 422, "warmup"),
        ({"warmup": [{"x": [10**12, 3]}]}, 422, "NORMSERVE_MAX_BODY_BYTES"),
        ({"unknown": 1}, 422, "unknown"),
    ],
)
async def test_options_that_cannot_be_are_refused(
    client: httpx.AsyncClient, options: dict[str, Any], status: int, words: str
) -> None:
    answer = await _serve(client, "options", graphs.doubling().SerializeToString(), **options)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]
    assert (await client.get("/v2/models/options")).status_code == 404


async def test_rows_that_depend_on_their_company_are_never_joined(client: httpx.AsyncClient) -> None:
    content = graphs.centered_over_the_batch().SerializeToString()
    answer = await _serve(client, "options", content, max_batch_size=8)
    refused(answer, 422, "parameter_invalid", "max_batch_size", "its company")


async def test_deterministic_is_a_flag(client: httpx.AsyncClient) -> None:
    x = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    parameters = {"normalized_shape": "4", "deterministic": "yes"}
    answer = await client.post("/v2/models/normcore.rms_norm/infer", json={"inputs": [x], "parameters": parameters})
    refused(answer, 400, "parameter_invalid", "deterministic", "true or false")
