"""/v1/jobs: watch and end long operations; and how an operation of another resource becomes one."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Response
from pydantic import BaseModel

from service.api.dependencies import ServicesDep
from service.api.errors import problem
from service.api.job_schemas import JobAnswer, JobList, JobSummary
from service.application.jobs import Job, Report
from service.state import Services

router = APIRouter(prefix="/v1", tags=["jobs"])

_JSON = "application/json"
_PREFERENCE = "respond-async"
Prefer = Annotated[Sequence[str], Header(description="`respond-async` starts a job and answers 202 with its path.")]
ASYNCHRONOUS: dict[int | str, dict[str, Any]] = {
    202: {
        "model": JobAnswer,
        "description": "The job that was started, as asked for with `Prefer: respond-async`; `Location` is its path.",
    }
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an operation came to: its document, the path of what it made, and whether that is new."""

    content: BaseModel
    location: str | None = None
    is_new: bool = False


@router.get("/jobs")
async def list_jobs(services: ServicesDep) -> JobList:
    """List the jobs that run or are remembered, oldest first."""
    return JobList(jobs=[JobSummary.of(job) for job in services.jobs.list()])


@router.get("/jobs/{job_id}", response_model=JobAnswer)
async def read_job(job_id: str, services: ServicesDep) -> Response:
    """Read a job: its progress, and its result or error once it has ended.

    Jobs live in the running service: after a restart the answer is 404, and a job that ran then has made nothing.
    """
    return _document(services.jobs.get(job_id), status=200)


@router.delete("/jobs/{job_id}", response_model=JobAnswer)
async def delete_job(job_id: str, services: ServicesDep) -> Response:
    """Cancel a job if it still runs, and forget it.

    The answer is the job as it ended: `cancelled`, and then it has made nothing, or `succeeded` where that came first.
    """
    return _document(await services.jobs.end(job_id), status=200)


async def answer_or_start(
    services: Services,
    prefer: Sequence[str],
    work: Callable[[Report | None], Awaitable[Answer]],
    *,
    operation: str,
    subject: str,
) -> Response:
    """Do the work and answer, or start it as a job and answer 202 where the `Prefer` headers ask for that."""
    if not _prefers_job(prefer):
        answer = await work(None)
        headers = {"Location": answer.location} if answer.location else {}
        content = answer.content.model_dump_json()
        return Response(content, status_code=201 if answer.is_new else 200, headers=headers, media_type=_JSON)

    async def encoded(report: Report) -> bytes:
        return (await work(report)).content.model_dump_json().encode()

    job = services.jobs.start(operation, encoded, subject=subject)
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": _PREFERENCE}
    return _document(job, status=202, headers=headers)


def _prefers_job(prefer: Sequence[str]) -> bool:
    preferences = ",".join(prefer).split(",")
    return any(preference.partition(";")[0].strip().lower() == _PREFERENCE for preference in preferences)


def _document(job: Job, *, status: int, headers: dict[str, str] | None = None) -> Response:
    """The result goes out as the bytes that it is."""
    document = JobSummary.of(job).model_dump() | {
        "result": None if job.result is None else orjson.Fragment(job.result),
        "error": None if job.error is None else problem(job.error, request_id=job.request_id),
    }
    return Response(orjson.dumps(document), status_code=status, headers=headers, media_type=_JSON)
