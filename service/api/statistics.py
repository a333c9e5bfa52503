"""/v1/statistics: make, read, freeze, merge and delete statistics; batches.py takes the posts."""

from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.dependencies import ServicesDep, document_schema, read_document
from service.api.infer import run_codec
from service.api.preconditions import IfMatch, etag, is_known
from service.api.statistics_schemas import (
    HistogramAnswer,
    MergeRequest,
    Nothing,
    Statistics,
    StatisticsList,
    StatisticsRequest,
    StatisticsSummary,
    document,
)
from service.application.totals import Snapshot
from service.state import Services

_BYTES_PER_CHANNEL = 200  # of nine numbers as text

router = APIRouter(prefix="/v1/statistics", tags=["statistics"])

_IF_MATCH: dict[str, Any] = {
    "parameters": [
        {
            "name": "If-Match",
            "in": "header",
            "required": False,
            "description": "Change only this state of the resource, named by its ETag; 412 where it has moved on.",
            "schema": {"type": "string"},
        }
    ]
}


@router.post("", status_code=201, response_model=Statistics, openapi_extra=document_schema(StatisticsRequest))
async def create_statistics(request: Request, services: ServicesDep) -> Response:
    """Start to collect statistics of batches.

    Post batches to `/v1/statistics/{id}/batches`, from as many workers as you like.
    """
    wanted = await read_document(request, StatisticsRequest)
    return await _created(await services.statistics.create(wanted.wanted()), services)


@router.get("")
async def list_statistics(services: ServicesDep) -> StatisticsList:
    """List all statistics, oldest first, without their numbers."""
    return StatisticsList(statistics=[StatisticsSummary.of(record) for record in await services.statistics.records()])


@router.post(
    "/merge",
    status_code=201,
    response_model=Statistics,
    openapi_extra=document_schema(MergeRequest),
)
async def merge_statistics(request: Request, services: ServicesDep) -> Response:
    """Merge statistics into a new resource; the sources stay as they are.

    `pooled` and `paper` are those of all batches together; `ema` and `ema_debiased` are null, for there is no order of
    the batches. A resource and its frozen copy hold the same batches: merging both counts them twice.
    """
    wanted = await read_document(request, MergeRequest)
    return await _created(await services.statistics.merge(wanted.ids, name=wanted.name), services)


@router.get("/{statistics_id}", response_model=Statistics)
async def read_statistics(statistics_id: str, request: Request, services: ServicesDep) -> Response:
    """Read statistics, in every definition side by side.

    The `ETag` names this state; `If-None-Match` with it answers 304 as long as nothing was posted.
    """
    snapshot = await services.statistics.get(statistics_id)
    if is_known(request.headers, snapshot.record):
        return Response(status_code=304, headers={"ETag": etag(snapshot.record)})
    return await _answer(snapshot, services, status=200)


@router.get("/{statistics_id}/histogram")
async def read_histogram(
    statistics_id: str, services: ServicesDep, bins: int = 64, channel: int | None = None
) -> HistogramAnswer:
    """Read a histogram of the posted values, of one channel or of all together.

    Of a batch with more than NORMSERVE_HISTOGRAM_VALUES values an even sample counts; moments have no values that
    could. Above 256 channels only all together are counted.
    """
    found = await services.statistics.histogram(statistics_id, bins=bins, channel=channel)
    return HistogramAnswer.of(found, channel=channel)


@router.delete("/{statistics_id}", status_code=204, openapi_extra=_IF_MATCH)
async def delete_statistics(statistics_id: str, request: Request, services: ServicesDep) -> None:
    """Delete statistics and the idempotency keys of their posts; frozen and merged copies stay."""
    await services.statistics.delete(statistics_id, check=IfMatch.of(request.headers).check)


@router.post("/{statistics_id}/freeze", status_code=201, response_model=Statistics, openapi_extra=_IF_MATCH)
async def freeze_statistics(statistics_id: str, request: Request, services: ServicesDep) -> Response:
    """Freeze the present state into a new resource that never changes; the source stays open.

    Its `content_hash` is the same wherever the same numbers were frozen.
    """
    condition = IfMatch.of(request.headers)
    await read_document(request, Nothing)
    return await _created(await services.statistics.freeze(statistics_id, check=condition.check), services)


async def _created(snapshot: Snapshot, services: Services) -> Response:
    response = await _answer(snapshot, services, status=201)
    response.headers["Location"] = f"/v1/statistics/{snapshot.record.id}"
    return response


async def _answer(snapshot: Snapshot, services: Services, *, status: int) -> Response:
    size_bytes = snapshot.record.num_features * _BYTES_PER_CHANNEL
    content = await run_codec(services, lambda: document(snapshot), size_bytes=size_bytes)
    headers = {"ETag": etag(snapshot.record)}
    return Response(content, status_code=status, headers=headers, media_type="application/json")
