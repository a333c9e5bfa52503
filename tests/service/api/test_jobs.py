"""Jobs over HTTP: started by a preference, watched, ended, bounded, and honest about what became of them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service import hostile
from tests.service.api.test_refusals import refused
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.asyncio(loop_scope="session")

ASYNC = {"prefer": "respond-async"}


@asynccontextmanager
async def service(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with running_app(small_settings(folder, **settings)) as app, http(app) as client:
        yield client


async def upload(client: httpx.AsyncClient, content: bytes) -> str:
    return str((await client.post("/v1/checkpoints", content=content)).json()["id"])


async def start(client: httpx.AsyncClient, checkpoint_id: str, **request: Any) -> str:
    """Path of a new fold job."""
    answer = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", headers=ASYNC, **request)
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.json()["state"] == "waiting"
    return answer.headers["location"]


async def watch(
    client: httpx.AsyncClient, path: str, *, until: tuple[str, ...] = ("succeeded", "failed")
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The job in one of these states, and the different steps seen on the way."""
    seen: list[dict[str, Any]] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        job = (await client.get(path)).json()
        if job["progress"] and job["progress"] not in seen:
            seen.append(job["progress"])
        if job["state"] in until:
            return job, seen
        await asyncio.sleep(0.001)
    raise AssertionError(f"{path} does not end")


async def test_a_fold_as_a_job_answers_what_the_fold_would(tmp_path: Path) -> None:
    async with service(tmp_path) as client:
        checkpoint_id = await upload(client, hostile.small_conv())
        path = await start(client, checkpoint_id, json={"verify": {"probes": 40, "seed": 7}})
        job, seen = await watch(client, path)
        assert (job["state"], job["error"], job["operation"]) == ("succeeded", None, "fold")
        assert job["subject"] == f"/v1/checkpoints/{checkpoint_id}"
        assert job["created_at"] <= job["ended_at"]
        made = job["result"]["checkpoint"]
        assert made["folded_from"] == checkpoint_id
        assert (await client.get(f"/v1/checkpoints/{made['id']}")).json() == made
        assert job["progress"] == {"step": "done", "done": 5, "total": 5}
        assert {step["total"] for step in seen} == {5}
        assert [step["done"] for step in seen] == sorted(step["done"] for step in seen)
        assert "verify" in {step["step"] for step in seen}
        direct = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", json={"verify": {"probes": 40, "seed": 7}})
        assert direct.json() == job["result"]
        listed = (await client.get("/v1/jobs")).json()["jobs"]
        assert [entry["id"] for entry in listed] == [job["id"]]
        assert "result" not in listed[0]


@pytest.mark.parametrize(
    "value", ["respond-async, wait=10", "handling=lenient,Respond-Async;foo=1"], ids=["with-wait", "among-others"]
)
async def test_the_preference_is_found_among_others(client: httpx.AsyncClient, value: str) -> None:
    checkpoint_id = await upload(client, hostile.small_conv())
    answer = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", headers={"prefer": value})
    assert answer.status_code == 202
    assert (await client.delete(answer.headers["location"])).status_code == 200


async def test_other_preferences_start_no_job(client: httpx.AsyncClient) -> None:
    checkpoint_id = await upload(client, hostile.small_conv())
    answer = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", headers={"prefer": "return=minimal"})
    assert answer.status_code in (200, 201)


async def test_a_failed_job_holds_the_error_envelope(tmp_path: Path) -> None:
    async with service(tmp_path) as client:
        checkpoint_id = await upload(client, hostile.small_conv())
        (tmp_path / "data" / "blobs" / checkpoint_id[:2] / checkpoint_id).unlink()
        headers = ASYNC | {"x-request-id": "the-one-that-started-it"}
        answer = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", headers=headers)
        job, _ = await watch(client, answer.headers["location"])
        direct = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold")
    assert (job["state"], job["result"]) == ("failed", None)
    assert job["error"]["code"] == "checkpoint_not_found"
    assert job["error"]["request_id"] == "the-one-that-started-it"
    assert job["error"] | {"request_id": ""} == direct.json() | {"request_id": ""}


async def test_mistakes_are_answered_at_once_and_start_nothing(client: httpx.AsyncClient) -> None:
    before = (await client.get("/v1/jobs")).json()
    refused(await client.post("/v1/checkpoints/nothing/fold", headers=ASYNC), 404, "checkpoint_not_found")
    checkpoint_id = await upload(client, hostile.small_conv())
    answer = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", headers=ASYNC, json={"probes": 1})
    refused(answer, 422, "parameter_invalid", "probes")
    assert (await client.get("/v1/jobs")).json() == before


async def test_a_deleted_job_is_cancelled_and_makes_nothing(tmp_path: Path) -> None:
    async with service(tmp_path) as client:
        checkpoint_id = await upload(client, hostile.endless_loop_before_norm())
        path = await start(client, checkpoint_id)
        await watch(client, path, until=("running",))
        refused(await client.delete(f"/v1/checkpoints/{checkpoint_id}"), 409, "conflict", "in use")
        started = time.monotonic()
        first, second = await asyncio.gather(client.delete(path), client.delete(path))
        assert time.monotonic() - started < 10
        assert first.json() == second.json()
        assert (first.json()["state"], first.json()["result"], first.json()["error"]) == ("cancelled", None, None)
        refused(await client.get(path), 404, "job_not_found", path.rpartition("/")[2])
        refused(await client.delete(path), 404, "job_not_found")
        assert list((tmp_path / "data" / "staging").iterdir()) == []
        assert (await client.delete(f"/v1/checkpoints/{checkpoint_id}")).status_code == 204


async def test_a_finished_job_is_forgotten_and_what_it_made_stays(client: httpx.AsyncClient) -> None:
    path = await start(client, await upload(client, hostile.small_conv()))
    job, _ = await watch(client, path)
    assert (await client.delete(path)).json() == job
    assert (await client.get(path)).status_code == 404
    assert (await client.get(f"/v1/checkpoints/{job['result']['checkpoint']['id']}")).status_code == 200


async def test_too_many_unfinished_jobs_are_refused(tmp_path: Path) -> None:
    async with service(tmp_path, max_running_jobs=2) as client:
        checkpoint_id = await upload(client, hostile.endless_loop_before_norm())
        paths = [await start(client, checkpoint_id) for _ in range(2)]
        answer = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", headers=ASYNC)
        refused(answer, 429, "overloaded", "NORMSERVE_MAX_RUNNING_JOBS")
        assert answer.headers["retry-after"]
        states = [entry["state"] for entry in (await client.get("/v1/jobs")).json()["jobs"]]
        assert states[1] == "waiting"
        assert (await client.delete(paths[1])).json()["progress"] is None
        await client.delete(await start(client, checkpoint_id))
        await client.delete(paths[0])


async def test_a_job_without_a_place_in_the_sandbox_is_refused_at_once(tmp_path: Path) -> None:
    async with service(tmp_path, sandbox_slots=1, sandbox_queue=1, max_running_jobs=8) as client:
        checkpoint_id = await upload(client, hostile.endless_loop_before_norm())
        paths = [await start(client, checkpoint_id) for _ in range(2)]
        answer = await client.post(f"/v1/checkpoints/{checkpoint_id}/fold", headers=ASYNC)
        refused(answer, 429, "overloaded", "NORMSERVE_SANDBOX_QUEUE")
        assert answer.headers["retry-after"]
        assert len((await client.get("/v1/jobs")).json()["jobs"]) == 2
        assert (await client.delete(paths[0])).json()["state"] == "cancelled"
        await client.delete(await start(client, checkpoint_id))
        await client.delete(paths[1])


async def test_a_job_takes_one_place_for_all_that_it_runs(tmp_path: Path) -> None:
    async with service(tmp_path, sandbox_slots=1, sandbox_queue=1, sandbox_deadline_s=8) as client:
        small, endless = [
            await upload(client, file) for file in (hostile.small_conv(), hostile.endless_loop_before_norm())
        ]
        path = await start(client, small)
        other = await start(client, endless)
        job, _ = await watch(client, path)
        assert job["state"] == "succeeded", "the fold is inspected while all other places are taken"
        await client.delete(other)


@pytest.mark.parametrize(
    ("bound", "count"),
    [({"max_finished_jobs": 2}, 2), ({"max_job_result_bytes": 1}, 1)],
    ids=["count", "bytes-of-results"],
)
async def test_the_oldest_finished_jobs_are_forgotten(tmp_path: Path, bound: dict[str, int], count: int) -> None:
    async with service(tmp_path, **bound) as client:
        checkpoint_id = await upload(client, hostile.small_conv())
        paths = []
        for _ in range(3):
            paths.append(await start(client, checkpoint_id))
            await watch(client, paths[-1])
        kept = [entry["id"] for entry in (await client.get("/v1/jobs")).json()["jobs"]]
        assert kept == [path.rpartition("/")[2] for path in paths[-count:]]


async def test_a_stopped_service_ends_its_jobs(tmp_path: Path) -> None:
    async with service(tmp_path) as client:
        checkpoint_id = await upload(client, hostile.endless_loop_before_norm())
        path = await start(client, checkpoint_id)
        await watch(client, path, until=("running",))
        started = time.monotonic()
    assert time.monotonic() - started < 10
    async with service(tmp_path) as client:
        refused(await client.get(path), 404, "job_not_found", "restarts")
        assert (await client.get("/v1/jobs")).json() == {"jobs": []}
        assert (await client.get(f"/v1/checkpoints/{checkpoint_id}")).status_code == 200
