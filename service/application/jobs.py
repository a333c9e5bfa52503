"""Jobs: long operations that a client starts, watches and ends. They live in this process and end with it."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from normcore.errors import NormcoreError
from service.errors import JobNotFoundError, OverloadedError, ServiceError
from service.storage.metadata import now
from service.telemetry import request_id

log = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["waiting", "running", "succeeded", "failed", "cancelled"]
Report = Callable[[str, int, int], None]
Work = Callable[[Report], Awaitable[bytes]]

_MAX_STEP = 80


@dataclass(frozen=True, slots=True)
class Progress:
    """What is being done, how many steps are done and how many there are, as the operation itself says."""

    step: str
    done: int
    total: int


@dataclass(slots=True)
class Job:
    """One operation; `result` is the JSON document that a synchronous call would have answered."""

    id: str
    operation: str
    subject: str
    request_id: str
    created_at: str
    state: State = "waiting"
    progress: Progress | None = None
    ended_at: str | None = None
    result: bytes | None = None
    error: Exception | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def is_finished(self) -> bool:
        return self.ended_at is not None

    def report(self, step: str, done: int, total: int) -> None:
        """Take what the operation says of itself, which may be an uploaded graph's doing."""
        self.state = "running"
        self.progress = Progress(str(step)[:_MAX_STEP], int(done), int(total))

    def end(self, state: State) -> None:
        self.state = state
        self.ended_at = now()


class Jobs:
    """Starts, keeps and ends jobs. It belongs to one event loop.

    A restart forgets every job; what a finished one has made (a checkpoint) stays.
    """

    def __init__(
        self,
        *,
        max_running: int,
        max_finished: int,
        max_result_bytes: int,
        reserve: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`reserve` admits a job's work, or raises OverloadedError; the work runs within the context."""
        self._max_running = max_running
        self._max_finished = max_finished
        self._max_result_bytes = max_result_bytes
        self._reserve = reserve
        self._jobs: dict[str, Job] = {}

    def start(self, operation: str, work: Work, *, subject: str) -> Job:
        """Start `work`, which reports its steps and returns its JSON document.

        Args:
            operation: what is done, in one word.
            work: the operation; a failure of it is the job's.
            subject: path of the resource it works on.

        Raises:
            OverloadedError: too many jobs are unfinished, or other work fills the place of theirs.
        """
        unfinished = sum(not job.is_finished for job in self._jobs.values())
        if unfinished >= self._max_running:
            raise OverloadedError(f"{unfinished} jobs run or wait already (NORMSERVE_MAX_RUNNING_JOBS); try again")
        place = self._reserve()
        job = Job(secrets.token_hex(16), operation, subject, request_id.get(), now())
        self._jobs[job.id] = job
        job._task = asyncio.create_task(self._run(job, work, place), name=f"job {job.id}")
        return job

    def get(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise JobNotFoundError(
                f"job: no job with the id {job_id[:80]!r}; jobs are forgotten when they are deleted, when newer ones "
                "have finished (NORMSERVE_MAX_FINISHED_JOBS) and when the service restarts"
            )
        return job

    def list(self) -> list[Job]:
        """The known jobs, oldest first."""
        return list(self._jobs.values())

    async def end(self, job_id: str) -> Job:
        """Cancel a job that is not finished, forget it, and return it as it ended."""
        job = self.get(job_id)
        await self._cancel(job)
        self._jobs.pop(job_id, None)
        return job

    async def close(self) -> None:
        """Cancel what is not finished."""
        for job in self.list():
            await self._cancel(job)

    async def _cancel(self, job: Job) -> None:
        """Cancel once: a second time would interrupt the job's own tidying up."""
        task = job._task
        assert task is not None
        await job.begun.wait()  # else the work would never hear of it, and never let go of what it holds
        if not task.cancelling():
            task.cancel()
        await asyncio.wait([task])

    async def _run(self, job: Job, work: Work, place: AbstractContextManager[None]) -> None:
        job.begun.set()
        try:
            with place:
                job.result = await work(job.report)
        except asyncio.CancelledError:
            job.end("cancelled")
        except Exception as error:  # a job's failure is its answer
            if not isinstance(error, ServiceError | NormcoreError):
                log.exception("unhandled error in a job")
            job.error = error
            job.end("failed")
        else:
            if job.progress is not None:
                job.report("done", job.progress.total, job.progress.total)
            job.end("succeeded")
        log.info("job", extra={"job": job.id, "operation": job.operation, "state": job.state})
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Keep the newest finished jobs, the last one whatever its size."""
        finished = sorted((job for job in self._jobs.values() if job.ended_at), key=lambda job: str(job.ended_at))
        kept_bytes = sum(len(job.result or b"") for job in finished)
        count = len(finished)
        for job in finished[:-1]:
            if count <= self._max_finished and kept_bytes <= self._max_result_bytes:
                return
            count -= 1
            kept_bytes -= len(job.result or b"")
            del self._jobs[job.id]


async def completed(steps: Coroutine[Any, Any, T]) -> T:
    """The result of steps that belong together: a cancellation that comes between them comes too late."""
    task = asyncio.ensure_future(steps)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    return task.result()


def then_keep(report: Report | None) -> Report | None:
    """A child's report in which keeping what the child has made is one more step."""
    if report is None:
        return None
    return lambda step, done, total: report("keep" if done == total else step, done, total + 1)
