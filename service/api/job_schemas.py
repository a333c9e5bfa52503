"""The JSON documents of jobs."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.api.schemas import Problem
from service.application.jobs import Job


class JobProgress(BaseModel):
    """How far a job is, in its own words: a step may take longer than another, and a fold may go back a step."""

    step: str = Field(description="What is being done.")
    done: int = Field(description="Steps that are done.")
    total: int = Field(description="Steps in all, as far as is known.")


class JobSummary(BaseModel):
    """A job, without its result."""

    id: str
    operation: str
    subject: str = Field(description="Path of the resource it works on.")
    state: Literal["waiting", "running", "succeeded", "failed", "cancelled"]
    progress: JobProgress | None = Field(description="None while it waits for its turn.")
    created_at: str
    ended_at: str | None

    @classmethod
    def of(cls, job: Job) -> "JobSummary":
        progress = job.progress
        return cls(
            id=job.id,
            operation=job.operation,
            subject=job.subject,
            state=job.state,
            progress=JobProgress(step=progress.step, done=progress.done, total=progress.total) if progress else None,
            created_at=job.created_at,
            ended_at=job.ended_at,
        )


class JobAnswer(JobSummary):
    """A job with what it came to."""

    result: dict[str, Any] | None = Field(description="What the call would have answered without the preference.")
    error: Problem | None = Field(description="The error that the call would have been answered with.")


class JobList(BaseModel):
    """The known jobs, oldest first, without their results."""

    jobs: list[JobSummary]
