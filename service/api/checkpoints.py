"""/v1/checkpoints: upload, list, read, plan, fold, delete; /v1/fold: fold a file in one call."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from normcore.folding.checkpoint import verdict_of
from service.api import body
from service.api.dependencies import ServicesDep, document_schema, read_document
from service.api.jobs import ASYNCHRONOUS, Answer, Prefer, answer_or_start
from service.api.multipart import FileField
from service.api.reports import Certificate, FoldReport, Normalization, RecalibrationReport
from service.api.schemas import (
    Checkpoint,
    CheckpointList,
    FoldAnswer,
    FoldPlan,
    FoldQuery,
    FoldRequest,
    PlanQuery,
    VerifyRequest,
)
from service.application.checkpoints import SUFFIXES
from service.application.folding import FoldedFile
from service.application.jobs import Report
from service.errors import CheckpointNotFoundError, PayloadMalformedError
from service.state import Services

router = APIRouter(prefix="/v1", tags=["checkpoints"])

_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
_MEDIA_TYPES = {"safetensors": "application/vnd.safetensors"}


@router.post(
    "/checkpoints",
    status_code=201,
    responses={200: {"model": Checkpoint, "description": "The same bytes are kept already."}},
    openapi_extra=_UPLOAD_BODY,
)
async def upload_checkpoint(
    request: Request,
    response: Response,
    services: ServicesDep,
    filename: Annotated[
        str, Query(max_length=255, description="Name to show; it decides nothing. Empty: the form's.")
    ] = "",
) -> Checkpoint:
    """Upload a checkpoint and see every normalization in it.

    The body is the file itself, or a multipart form with the field `file`. The format is found from the content.
    The answer lists every normalization with what it would fold into, or the reason why not. The same bytes again
    answer 200 with the same id.

    ```sh
    curl -s --data-binary @model.onnx 'http://127.0.0.1:8000/v1/checkpoints?filename=model.onnx'
    ```
    """
    services.health.refuse_while_draining()
    field, chunks = _upload(request, services)
    staged = await services.checkpoints.stage(chunks)
    name = filename or (field.filename if field else "")
    record, is_new = await services.checkpoints.keep(staged, filename=name)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/checkpoints/{record.id}"
    return Checkpoint.of(record)


@router.get("/checkpoints")
async def list_checkpoints(services: ServicesDep) -> CheckpointList:
    """List the kept checkpoints, oldest first."""
    return CheckpointList(checkpoints=[Checkpoint.of(record) for record in await services.checkpoints.list()])


@router.get("/checkpoints/{checkpoint_id}")
async def read_checkpoint(checkpoint_id: str, services: ServicesDep) -> Checkpoint:
    """Read what is known of one checkpoint."""
    return Checkpoint.of(await services.checkpoints.get(checkpoint_id))


@router.get("/checkpoints/{checkpoint_id}/content", response_class=FileResponse)
async def download_checkpoint(checkpoint_id: str, request: Request, services: ServicesDep) -> Response:
    """Download the file. Its ETag is its id.

    ```sh
    curl -s http://127.0.0.1:8000/v1/checkpoints/$ID/content -o model.onnx
    ```
    """
    record = await services.checkpoints.get(checkpoint_id)
    etag = f'"{record.id}"'
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"ETag": etag})
    path = services.checkpoints.path(checkpoint_id)
    return FileResponse(path, media_type=_media_type(record.format), filename=record.filename, headers={"ETag": etag})


@router.delete("/checkpoints/{checkpoint_id}", status_code=204)
async def delete_checkpoint(checkpoint_id: str, services: ServicesDep) -> None:
    """Delete a checkpoint that no model uses."""
    await services.checkpoints.delete(checkpoint_id)


@router.get("/checkpoints/{checkpoint_id}/plan")
async def plan_fold(checkpoint_id: str, query: Annotated[PlanQuery, Query()], services: ServicesDep) -> FoldPlan:
    """See what a fold would do, without doing it.

    Every normalization is listed with what it would fold into, or the reason why not; for named tensors with every
    check that was made. Nothing is written.
    """
    plan = await services.checkpoints.plan(checkpoint_id, query.options())
    entries = [Normalization(**entry) for entry in plan["normalizations"]]
    foldable = sum(entry.status == "foldable" for entry in entries)
    return FoldPlan(checkpoint=checkpoint_id, foldable=foldable, normalizations=entries, notes=plan["notes"])


@router.post(
    "/checkpoints/{checkpoint_id}/fold",
    status_code=201,
    response_model=FoldAnswer,
    responses=ASYNCHRONOUS
    | {200: {"model": FoldAnswer, "description": "Nothing new: nothing folds, or this fold is kept already."}},
    openapi_extra=document_schema(FoldRequest, is_required=False),
)
async def fold_checkpoint(checkpoint_id: str, request: Request, services: ServicesDep, prefer: Prefer = ()) -> Response:
    """Fold a checkpoint into a new one, with a report and a certificate.

    Each fold is proven at its own output and the network on seeded probes, in float64 and in the checkpoint's own
    precision. A fold that fails its proof is withdrawn. When nothing folds the answer is 200 with the same checkpoint,
    and the report says why. With `Prefer: respond-async` the answer is 202 and a job.
    """
    services.health.refuse_while_draining()
    wanted = await read_document(request, FoldRequest)
    options = wanted.options()
    await services.checkpoints.get(checkpoint_id)

    async def fold(report: Report | None) -> Answer:
        outcome = await services.folding.fold(checkpoint_id, options, progress=report)
        content = FoldAnswer(checkpoint=Checkpoint.of(outcome.checkpoint), report=FoldReport(**outcome.report))
        return Answer(content, location=f"/v1/checkpoints/{outcome.checkpoint.id}", is_new=outcome.is_new)

    subject = f"/v1/checkpoints/{checkpoint_id}"
    return await answer_or_start(services, prefer, fold, operation="fold", subject=subject)


@router.get("/checkpoints/{checkpoint_id}/report")
async def read_report(checkpoint_id: str, services: ServicesDep) -> FoldReport | RecalibrationReport:
    """Read the report of the fold or recalibration that made a checkpoint."""
    record = await services.checkpoints.get(checkpoint_id)
    if record.report is None:
        raise CheckpointNotFoundError(f"report: checkpoint {record.id} was uploaded, not made here")
    if "recalibrated" in record.report:
        return RecalibrationReport(**record.report)
    return FoldReport(**record.report)


@router.post(
    "/checkpoints/{checkpoint_id}/compare/{other_id}",
    openapi_extra=document_schema(VerifyRequest, is_required=False),
)
async def compare_checkpoints(
    checkpoint_id: str, other_id: str, request: Request, services: ServicesDep
) -> Certificate:
    """Compare two checkpoints, whoever made the second: the certificate of a fold, for any two networks.

    The first counts as right. The verdict is `equivalent` when the second is as close to float64 as the first on every
    probe, `different` when it is not, and `inconclusive` when too few probes could tell. `regions` lists the parts
    that differ between tensors that both have. Two checkpoints with other inputs or outputs are refused.
    """
    services.health.refuse_while_draining()
    wanted = await read_document(request, VerifyRequest)
    return Certificate(**await services.folding.compare(checkpoint_id, other_id, wanted.options()))


@router.post("/fold", openapi_extra=_UPLOAD_BODY, response_class=FileResponse)
async def fold_file(request: Request, query: Annotated[FoldQuery, Query()], services: ServicesDep) -> Response:
    """Fold a file in one call: checkpoint in, folded checkpoint out, nothing kept.

    The body is the file itself, or a multipart form with the field `file`. The headers `Normserve-Verdict`,
    `Normserve-Folded` and `Normserve-Normalizations` carry the verdict and counts.

    ```sh
    curl -s --data-binary @model.onnx http://127.0.0.1:8000/v1/fold -o folded.onnx -D -
    ```
    """
    services.health.refuse_while_draining()
    _, chunks = _upload(request, services)
    async with AsyncExitStack() as stack:
        folded = await stack.enter_async_context(services.folding.fold_once(chunks, query.fold()))
        return _FoldedResponse(folded, release=stack.pop_all().aclose)


class _FoldedResponse(FileResponse):
    """Sends a folded file and releases it, whether or not the client stays."""

    def __init__(self, folded: FoldedFile, *, release: Callable[[], Awaitable[None]]) -> None:
        headers = {
            "Normserve-Verdict": verdict_of(folded.report),
            "Normserve-Folded": str(folded.report["folded"]),
            "Normserve-Normalizations": str(folded.report["normalizations"]),
        }
        media_type = _media_type(folded.format)
        filename = f"folded{SUFFIXES[folded.format]}"
        super().__init__(folded.path, media_type=media_type, filename=filename, headers=headers)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._release()


def _media_type(file_format: str) -> str:
    return _MEDIA_TYPES.get(file_format, "application/octet-stream")


def _upload(request: Request, services: Services) -> tuple[FileField | None, AsyncIterator[bytes]]:
    chunks = _bounded(request, services)
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        field = FileField(content_type)
        return field, field.content(chunks)
    return None, chunks


async def _bounded(request: Request, services: Services) -> AsyncIterator[bytes]:
    empty = True
    async for chunk in body.Stream(request.receive, request.headers, timeout_s=services.settings.body_timeout_s):
        empty = False
        yield chunk
    if empty:
        raise PayloadMalformedError("body: expected a checkpoint file, received nothing")
