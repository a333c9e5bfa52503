"""/metrics against a parser of Prometheus' own, and against what the statistics extension says."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service import hostile
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.asyncio(loop_scope="session")

LABELS = {"model": "normcore.rms_norm", "version": "1"}
INFER = "/v2/models/normcore.rms_norm/infer"
BODY = {
    "inputs": [{"name": "input", "shape": [2, 4], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6, 7, 8]}],
    "parameters": {"normalized_shape": "4"},
}


async def _scrape(client: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    # the parser adds `_total` to the names of counters, as OpenMetrics has them
    return {
        (sample.name.removesuffix("_total"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def _key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset((LABELS | labels).items())


async def test_counters_and_histograms_agree_with_the_statistics(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        for _ in range(5):
            assert (await client.post(INFER, json=BODY)).status_code == 200
        wrong = BODY | {"parameters": {"normalized_shape": "5"}}
        assert (await client.post(INFER, json=wrong)).status_code == 400
        found = await _scrape(client)
        (stats,) = (await client.get("/v2/models/normcore.rms_norm/stats")).json()["model_stats"]

        assert found[_key("nv_inference_request_success")] == 5
        assert found[_key("nv_inference_request_failure", reason="OTHER")] == 1
        assert found[_key("nv_inference_request_failure", reason="REJECTED")] == 0
        assert found[_key("nv_inference_count")] == stats["inference_count"] == 5
        assert found[_key("nv_inference_exec_count")] == stats["execution_count"] == 5
        assert found[_key("nv_inference_pending_request_count")] == 0
        for name, part in (("request", "success"), ("queue", "queue"), ("compute_infer", "compute_infer")):
            assert found[_key(f"nv_inference_{name}_duration_us")] == stats["inference_stats"][part]["ns"] // 1000
        for part in ("request", "queue", "decode", "compute", "encode"):
            assert found[_key(f"normserve_{part}_duration_seconds_bucket", le="+Inf")] == 5
            assert found[_key(f"normserve_{part}_duration_seconds_count")] == 5
        seconds = stats["inference_stats"]["success"]["ns"] / 1e9
        assert found[_key("normserve_request_duration_seconds_sum")] == pytest.approx(seconds)
        assert found[_key("normserve_batch_size_bucket", le="1")] == 5
        assert found[_key("normserve_request_bytes")] > 5 * 100
        assert found["process_resident_memory_bytes", frozenset()] > 10_000_000


async def test_methods_are_shown_from_their_first_call_on(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        assert not [labels for _, labels in await _scrape(client) if any(name == "model" for name, _ in labels)]
        wrong = BODY | {"parameters": {"normalized_shape": "5"}}
        assert (await client.post(INFER, json=wrong)).status_code == 400
        found = await _scrape(client)
    assert found[_key("nv_inference_request_failure", reason="OTHER")] == 1
    assert {dict(labels)["model"] for _, labels in found if "model" in dict(labels)} == {LABELS["model"]}


async def test_what_cannot_be_decoded_is_no_failure_of_the_model(client: httpx.AsyncClient) -> None:
    await client.post(INFER, json=BODY)
    before = await _scrape(client)
    for content, headers in (
        (b"{", {}),
        (b"", {}),
        (b"{}", {"Inference-Header-Content-Length": "9"}),
        (b'{"inputs": [{"name": "input", "shape": [2], "datatype": "FP32", "data": [1]}]}', {}),
    ):
        assert (await client.post(INFER, content=content, headers=headers)).status_code == 400
    after = await _scrape(client)
    for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
        key = _key("nv_inference_request_failure", reason=reason)
        assert after[key] == before[key]


async def test_buckets_are_cumulative(client: httpx.AsyncClient) -> None:
    await client.post(INFER, json=BODY)
    found = await _scrape(client)
    name = "normserve_request_duration_seconds_bucket"
    counts = [value for (sample, labels), value in found.items() if sample == name and set(LABELS.items()) <= labels]
    assert len(counts) == 19
    assert counts == sorted(counts)


async def test_labels_are_escaped(client: httpx.AsyncClient) -> None:
    uploaded = await client.post("/v1/checkpoints", content=hostile.small_conv())
    name = "metrics model-1.0"
    document = {"name": name, "checkpoint": uploaded.json()["id"], "fold": False}
    assert (await client.post("/v1/models", json=document)).status_code == 201
    found = await _scrape(client)
    assert found["nv_inference_count", frozenset({("model", name), ("version", "1")})] == 0
    await client.delete(f"/v1/models/{name}/versions/1")
    assert ("nv_inference_count", frozenset({("model", name), ("version", "1")})) not in await _scrape(client)


@pytest.mark.parametrize("path", [INFER, "/v1/normalizations/rms_norm"])
async def test_every_tensor_answer_says_where_its_time_went(client: httpx.AsyncClient, path: str) -> None:
    body = BODY if path == INFER else {"input": [[1, 2, 3, 4]], "normalized_shape": "4"}
    answer = await client.post(path, json=body)
    header = answer.headers["server-timing"]
    assert re.fullmatch(r"queue;dur=[\d.]+, decode;dur=[\d.]+, compute;dur=[\d.]+, encode;dur=[\d.]+", header)


async def test_a_request_that_is_refused_for_lack_of_room_counts_as_rejected(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, queue_size=1)
    async with running_app(settings) as app, http(app) as client:
        answers = await asyncio.gather(*(client.post(INFER, json=BODY) for _ in range(20)))
        refused = sum(answer.status_code == 429 for answer in answers)
        assert refused
        found = await _scrape(client)
        assert found[_key("nv_inference_request_failure", reason="REJECTED")] == refused
