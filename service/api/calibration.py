"""/v1/checkpoints/{id}/recalibrate and /drift: data for a checkpoint's inputs, in the encodings of tensors."""

from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from normcore.recalibration.drift import THRESHOLD
from normcore.recalibration.report import DriftVerdict, Kept, LayerShift
from service.api.body import Received
from service.api.dependencies import ServicesDep
from service.api.infer import check_json_size, run_codec
from service.api.jobs import ASYNCHRONOUS, Answer, Prefer, answer_or_start
from service.api.reports import RecalibrationReport
from service.api.schemas import Checkpoint
from service.application.calibration import StagedBatches
from service.application.jobs import Report
from service.codecs import json_v1, media, npy
from service.state import Services

router = APIRouter(prefix="/v1", tags=["checkpoints"])

Freeze = Annotated[bool, Query(description="Treat initializers that are also graph inputs as constants.")]

_JSON = "application/json"
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_TENSORS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Tensors by the names of the network's inputs; several batches with numbers, `x.0`, `x.1`. "
        "A .npy file is one batch of the network's only input.",
        "content": {
            _JSON: {"schema": {"type": "object"}},
            **{media_type: _BINARY for media_type in media.CODECS if media_type != _JSON},
        },
    }
}


class RecalibrationAnswer(BaseModel):
    """A recalibrated checkpoint and what moved."""

    checkpoint: Checkpoint
    report: RecalibrationReport


class DriftAnswer(BaseModel):
    """Whether a checkpoint's frozen statistics still fit the data."""

    checkpoint: str
    verdict: DriftVerdict = Field(
        description="`stale` when a layer's distance is over the threshold, `fresh` when all are within, `unknown` "
        "when there are no layers or too few values to tell."
    )
    sentence: str = Field(description="The verdict with its numbers.")
    threshold: float
    batches: int
    layers: list[LayerShift]
    kept: list[Kept] = Field(description="Batch norms without frozen statistics to compare, each with the reason.")


@router.post(
    "/checkpoints/{checkpoint_id}/recalibrate",
    status_code=201,
    response_model=RecalibrationAnswer,
    responses=ASYNCHRONOUS,
    openapi_extra=_TENSORS,
)
async def recalibrate_checkpoint(
    checkpoint_id: str,
    request: Request,
    services: ServicesDep,
    freeze_initializers: Freeze = False,
    prefer: Prefer = (),
) -> Response:
    """Recompute the running statistics of every batch norm from data, into a new checkpoint.

    Mean and unbiased variance of all values of a channel in all batches together (torch's convention), each layer
    measured behind layers that have their new statistics already. That takes one run over the data per depth: as many
    as batch norms lie one after the other. The answer says per layer how far its statistics moved. Where no batch norm
    has statistics of its own the answer is 200 with the same checkpoint and the reasons. With `Prefer: respond-async`
    the answer is 202 and a job.
    """

    async def recalibrate(staged: StagedBatches, report: Report | None) -> Answer:
        outcome = await services.calibration.recalibrate(
            staged, freeze_initializers=freeze_initializers, progress=report
        )
        document = RecalibrationReport.model_validate(outcome.report)
        content = RecalibrationAnswer(checkpoint=Checkpoint.of(outcome.checkpoint), report=document)
        return Answer(content, location=f"/v1/checkpoints/{outcome.checkpoint.id}", is_new=outcome.is_new)

    return await _with_batches(request, services, checkpoint_id, recalibrate, prefer=prefer, operation="recalibrate")


@router.post(
    "/checkpoints/{checkpoint_id}/drift", response_model=DriftAnswer, responses=ASYNCHRONOUS, openapi_extra=_TENSORS
)
async def measure_drift(
    checkpoint_id: str,
    request: Request,
    services: ServicesDep,
    threshold: Annotated[
        float,
        Query(
            gt=0,
            le=1e6,
            description="Distance, in frozen standard deviations (root mean square over the channels of "
            "sqrt(shift of the mean^2 + (ratio of the deviations - 1)^2)), beyond which a layer is stale.",
        ),
    ] = THRESHOLD,
    prefer: Prefer = (),
) -> Response:
    """See whether the frozen statistics of every batch norm still fit live data.

    One run of the network as it is, in which every batch norm's input is compared with its frozen mean and variance: so
    what follows a stale layer sees that layer's error. A layer with so few values that chance alone gives such a
    distance decides nothing.
    """

    async def drift(staged: StagedBatches, report: Report | None) -> Answer:
        found = await services.calibration.drift(staged, threshold=threshold, progress=report)
        return Answer(DriftAnswer.model_validate(found | {"checkpoint": staged.checkpoint}))

    return await _with_batches(request, services, checkpoint_id, drift, prefer=prefer, operation="drift")


async def _with_batches(
    request: Request,
    services: Services,
    checkpoint_id: str,
    use: Callable[[StagedBatches, Report | None], Awaitable[Answer]],
    *,
    prefer: Sequence[str],
    operation: str,
) -> Response:
    """Receive the batches, hold them for as long as the work on them takes, and answer."""
    services.health.refuse_while_draining()
    await services.checkpoints.get(checkpoint_id)
    held = AsyncExitStack()
    try:
        staged = await _receive(request, services, checkpoint_id, held)

        async def work(report: Report | None) -> Answer:
            async with held:
                return await use(staged, report)

        subject = f"/v1/checkpoints/{checkpoint_id}"
        return await answer_or_start(services, prefer, work, operation=operation, subject=subject)
    except BaseException:
        await held.aclose()
        raise


async def _receive(request: Request, services: Services, checkpoint_id: str, held: AsyncExitStack) -> StagedBatches:
    """The body's tensors on the disk; what they took in memory is free again."""
    reader = media.request_codec(request.headers.get("content-type"))
    async with Received(request.receive, request.headers, services) as body:
        json_bytes = len(body) if reader is json_v1 else 0
        check_json_size(json_bytes, services)
        decoded = await run_codec(
            services,
            lambda: reader.decode(body, tensor_names=_EveryName(), query_parameters={}),
            size_bytes=json_bytes,
        )
        staged = services.calibration.staged(checkpoint_id, decoded.tensors, is_unnamed=reader is npy)
        return await held.enter_async_context(staged)


class _EveryName(Collection[str]):
    """Which names a network's batches may have is judged after decoding, with the network at hand."""

    def __contains__(self, _: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
