"""The registry of jobs against work that fails, resists, or says strange things."""

import asyncio
from contextlib import nullcontext

import pytest

from service.application.jobs import Job, Jobs, Progress, Report, completed, then_keep
from service.errors import JobNotFoundError


def jobs() -> Jobs:
    return Jobs(max_running=8, max_finished=8, max_result_bytes=100, reserve=nullcontext)


async def ended(registry: Jobs, job: Job) -> Job:
    """The job once it has ended of itself."""
    async with asyncio.timeout(5):
        while not job.is_finished:  # noqa: ASYNC110 - nothing signals the end but the state
            await asyncio.sleep(0)
    return registry.get(job.id)


async def test_a_defect_fails_the_job_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work(report: Report) -> bytes:
        raise KeyError("a defect")

    registry = jobs()
    job = await ended(registry, registry.start("fold", work, subject="/x"))
    assert (job.state, job.result) == ("failed", None)
    assert isinstance(job.error, KeyError)
    assert "unhandled error in a job" in caplog.text


async def test_a_step_is_bounded_text() -> None:
    async def work(report: Report) -> bytes:
        report("x" * 1000, 1, 3)
        await asyncio.sleep(0)
        return b"{}"

    registry = jobs()
    job = registry.start("fold", work, subject="/x")
    await asyncio.sleep(0)
    assert (job.state, job.progress) == ("running", Progress("x" * 80, 1, 3))
    assert (await ended(registry, job)).progress == Progress("done", 3, 3)


async def test_a_job_that_reported_nothing_has_no_progress() -> None:
    async def work(report: Report) -> bytes:
        return b"{}"

    registry = jobs()
    assert (await ended(registry, registry.start("fold", work, subject="/x"))).progress is None


async def test_a_cancelled_job_tidies_up_undisturbed() -> None:
    tidied = asyncio.Event()

    async def work(report: Report) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)
            tidied.set()
        return b""

    registry = jobs()
    job = registry.start("fold", work, subject="/x")
    await asyncio.sleep(0)
    first = asyncio.create_task(registry.end(job.id))
    await asyncio.sleep(0.005)
    await asyncio.gather(first, registry.end(job.id), registry.close())
    assert tidied.is_set()
    assert job.state == "cancelled"
    with pytest.raises(JobNotFoundError, match=job.id):
        registry.get(job.id)


async def test_a_job_cancelled_before_its_first_step_lets_go_of_what_it_holds() -> None:
    released = asyncio.Event()

    async def work(report: Report) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            released.set()
        return b""

    registry = jobs()
    job = await registry.end(registry.start("fold", work, subject="/x").id)
    assert (job.state, released.is_set()) == ("cancelled", True)


async def test_cancelling_what_is_being_kept_comes_too_late() -> None:
    async def keep() -> bytes:
        await asyncio.sleep(0.02)
        return b"kept"

    async def work(report: Report) -> bytes:
        return await completed(keep())

    registry = jobs()
    job = registry.start("fold", work, subject="/x")
    await asyncio.sleep(0.005)
    assert ((await registry.end(job.id)).state, job.result) == ("succeeded", b"kept")


async def test_completed_raises_what_its_steps_raise() -> None:
    async def fail() -> None:
        raise ValueError("in the steps")

    with pytest.raises(ValueError, match="in the steps"):
        await completed(fail())


async def test_a_single_large_result_is_kept_until_the_next() -> None:
    async def work(report: Report) -> bytes:
        return b"x" * 1000

    registry = jobs()
    first = await ended(registry, registry.start("fold", work, subject="/x"))
    assert registry.list() == [first]
    second = await ended(registry, registry.start("fold", work, subject="/x"))
    assert registry.list() == [second]


def test_keeping_is_one_more_step() -> None:
    heard: list[tuple[str, int, int]] = []
    report = then_keep(lambda *progress: heard.append(progress))
    assert report is not None
    for done, step in enumerate(("load", "done")):
        report(step, done, 1)
    assert heard == [("load", 0, 2), ("keep", 1, 2)]
    assert then_keep(None) is None
