"""POST /v1/statistics/{id}/batches, as plain ASGI: a tensor in any encoding, or the moments of one."""

import hashlib
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.datastructures import Headers, QueryParams
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from normcore.errors import ParameterError
from normcore.statistics import NAN_POLICIES
from service.api.asgi import services_of
from service.api.body import Received, received_stream
from service.api.infer import check_json_size, run_codec
from service.api.preconditions import IfMatch, idempotency_key
from service.api.streamed import FindLayout, pour, read_head
from service.application.batches import MOMENT_NAMES, TENSOR_NAMES, Digest, Reduced
from service.application.statistics import Batch
from service.codecs import json_v1, layout, media, npy, oip
from service.codecs.body import Codec, TensorBody
from service.state import Services
from service.storage.statistics import StatisticsRecord

_HEADER_DIGITS = 9
_TOGETHER = "input and mask together in the body, as JSON, application/x-npz or application/vnd.safetensors"


@dataclass(frozen=True, slots=True)
class _Format:
    """How a body is read: as a stream whose layout `find` tells, or by a codec once it is all here."""

    name: str
    codec: Codec
    find: FindLayout | None = None


async def post_batch(scope: Scope, receive: Receive, send: Send) -> None:
    """Count one batch. Where the answer is an error, or there is none, nothing has changed."""
    services = services_of(scope)
    headers = Headers(scope=scope)
    nan_policy = _nan_policy(QueryParams(scope["query_string"]).multi_items())
    key = idempotency_key(headers, limit=services.settings.max_idempotency_key_length)
    condition = IfMatch.of(headers)
    form = _format(headers)
    record = await services.statistics.open_for_posts(scope["path_params"]["statistics_id"])
    digest = hashlib.sha256(f"{form.name} {nan_policy}\n".encode())
    reduce = _reduce_whole if form.find is None else _reduce_stream
    reduced = await reduce(form, receive, headers, services, record, digest if key else None)
    batch = Batch(reduced.moments, reduced.histogram, nan_policy, key, digest.hexdigest())
    answer, is_replayed = await services.statistics.post(record.id, batch, check=condition.check)
    extra = {"Idempotent-Replayed": "true"} if is_replayed else {"ETag": f'"{answer["sequence"]}"'}
    await JSONResponse(answer, headers=extra)(scope, receive, send)


async def _reduce_whole(
    form: _Format,
    receive: Receive,
    headers: Headers,
    services: Services,
    record: StatisticsRecord,
    digest: Digest | None,
) -> Reduced:
    async with Received(receive, headers, services) as body:
        json_bytes = len(body) if form.codec is json_v1 else 0
        check_json_size(json_bytes, services)
        decoded = await run_codec(services, lambda: _decode(form.codec, body), size_bytes=json_bytes)
        return await services.batches.reduce(record, decoded.tensors, body=body, digest=digest)


async def _reduce_stream(
    form: _Format,
    receive: Receive,
    headers: Headers,
    services: Services,
    record: StatisticsRecord,
    digest: Digest | None,
) -> Reduced:
    assert form.find is not None
    async with aclosing(received_stream(receive, headers, services)) as chunks:
        found, head, first = await read_head(chunks, form.find)
        if digest is not None:
            digest.update(head)
        batch = services.batches.stream(
            record,
            found.datatype,
            found.tensor_shape,
            is_transposed=found.is_transposed,
            is_swapped=found.is_swapped,
            digest=digest,
        )
        with services.budget.held(batch.buffer_bytes):
            try:
                await pour(chunks, batch, found, first=first)
                return await batch.finish()
            finally:
                await batch.close()


def _decode(codec: Codec, body: memoryview) -> TensorBody:
    if codec is json_v1:
        decoded = json_v1.decode(body, tensor_names=TENSOR_NAMES, exact_names=MOMENT_NAMES)
    else:
        decoded = codec.decode(body, tensor_names=TENSOR_NAMES, query_parameters={})
    for name in (*decoded.parameters, *(["outputs"] if decoded.outputs else [])):
        raise ParameterError(name[:80], expected=f"no field but {', '.join(TENSOR_NAMES)}", received="another one")
    return decoded


def _format(headers: Headers) -> _Format:
    """The protocol's binary form is known by its own header, as on /v2, whatever the Content-Type."""
    length = headers.get(oip.HEADER)
    if length is not None:
        if not (length.isascii() and length.isdigit() and len(length) <= _HEADER_DIGITS):
            raise ParameterError(oip.HEADER, expected="a number of bytes", received=repr(length[:40]))
        return _Format("oip", json_v1, lambda head: layout.of_protocol(head, int(length)))
    codec = media.request_codec(headers.get("content-type"))
    find = (lambda head: npy.layout(head, field="body")) if codec is npy else None
    return _Format(codec.MEDIA_TYPE, codec, find)


def _nan_policy(query: Sequence[tuple[str, str]]) -> str:
    for name, _ in query:
        if name in TENSOR_NAMES:
            raise ParameterError(name, expected=_TOGETHER, received="a query parameter")
        if name != "nan_policy":
            raise ParameterError(name[:80], expected="no query parameter but nan_policy", received="an unknown one")
    if len(query) > 1:
        raise ParameterError("nan_policy", expected="one value", received=f"{len(query)}")
    policy = query[0][1] if query else "raise"
    if policy not in NAN_POLICIES:
        raise ParameterError("nan_policy", expected=f"one of {', '.join(NAN_POLICIES)}", received=repr(policy[:40]))
    return policy
