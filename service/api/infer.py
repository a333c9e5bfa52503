"""The infer endpoint of the Open Inference Protocol, as plain ASGI: bytes in, bytes out."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import TypeVar

import orjson
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.asgi import IS_WHOLE, CancelledWhenClientLeaves, headers_of, send_tensors, services_of
from service.api.body import Received
from service.api.compression import response_coding
from service.api.errors import ANSWERED, answer
from service.application.models import Entry, Models
from service.application.usage import Timing
from service.codecs import oip
from service.codecs.body import EncodedBody
from service.codecs.json_text import printable
from service.codecs.oip_binary import decode_raw
from service.engine.protocol import InferResult
from service.errors import ModelNotFoundError, PayloadTooLargeError
from service.state import Services

T = TypeVar("T")

_PATH = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_VERSION_DIGITS = 18
_INLINE_JSON_BYTES = 64 * 1024


class InferRoute:
    """POST /v2/models/{name}[/versions/{version}]/infer, in front of the framework.

    A small inference costs less than the layers and the search of routes that a request would pass in there.
    """

    path = "/v2/models/{name}/infer"

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _called(scope) if scope["type"] == "http" else None
        if found is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = self
        try:
            if scope["method"] != "POST":
                raise HTTPException(405, headers={"Allow": "POST"})
            await infer(found["name"], found["version"], scope, receive, send)
        except ANSWERED as error:
            await answer(scope, receive, send, error)


async def infer(name: str, version: str | None, scope: Scope, receive: Receive, send: Send) -> None:
    """One inference, bytes to bytes."""
    services = services_of(scope)
    entry = find_entry(services.models, name, version)
    entry.engine()
    headers = headers_of(scope)
    header = headers.get("inference-header-content-length")
    is_whole = IS_WHOLE in scope
    async with Received(receive, headers, services, aligned_at=_number(header), is_whole=is_whole) as body:
        if entry.loaded is None:  # another may have taken its place while the body came
            entry = find_entry(services.models, name, version)
        started = time.perf_counter_ns()
        request = await _decode(body, header, entry, services)
        decoded = time.perf_counter_ns()
        names = [output.name for output in request.outputs] or None
        with CancelledWhenClientLeaves(scope):
            result = await services.inference.infer(entry, request.inputs, outputs=names, parameters=request.parameters)
        computed = time.perf_counter_ns()
        encoded = await _encode(request, result, entry, services)
    timing = Timing(result.queue_ns, decoded - started, result.compute_ns, time.perf_counter_ns() - computed)
    entry.usage.succeeded(timing, result, request_bytes=len(body), response_bytes=encoded.size_bytes)
    await send_tensors(send, encoded, timing, coding=response_coding(headers))


def find_called_entry(models: Models, scope: Scope) -> Entry | None:
    """The model whose inference a request asks for; None where it asks for something else."""
    found = _called(scope)
    return None if found is None else find_entry(models, found["name"], found["version"])


def _called(scope: Scope) -> re.Match[str] | None:
    return _PATH.fullmatch(scope["path"].removeprefix(scope["root_path"]))


def find_entry(models: Models, name: str, version: str | None) -> Entry:
    """The model and version that a path names. Raises ModelNotFoundError."""
    if version is None:
        return models.find(name)
    if len(version) > _VERSION_DIGITS or not version.isascii() or not version.isdigit():
        raise ModelNotFoundError(f"model {name[:128]!r} has no version {version[:40]!r}")
    return models.find(name, int(version))


async def _decode(body: memoryview, header: str | None, entry: Entry, services: Services) -> oip.InferRequest:
    json_bytes = _json_bytes(body, header)
    check_json_size(json_bytes, services)
    request = await run_codec(services, lambda: oip.decode_request(body, header), size_bytes=json_bytes)
    if request.raw is None:
        return request
    return request._replace(inputs=decode_raw(request.raw, entry.engine().spec.inputs))


async def _encode(request: oip.InferRequest, result: InferResult, entry: Entry, services: Services) -> EncodedBody:
    are_binary = {output.name: output.is_binary for output in request.outputs}
    texts = [tensor.nbytes for name, tensor in result.outputs.items() if not are_binary.get(name, request.wants_binary)]
    parameters = None
    if result.diagnostics:
        diagnostics = orjson.dumps(printable(result.diagnostics, are_tokens_bare=False)).decode()
        parameters = {"diagnostics": diagnostics}
    return await run_codec(
        services,
        lambda: oip.encode_response(
            entry.name,
            str(entry.version),
            result.outputs,
            id=request.id,
            parameters=parameters,
            requested=request.outputs,
            wants_binary=request.wants_binary,
        ),
        size_bytes=sum(texts),
    )


def _json_bytes(body: memoryview, header: str | None) -> int:
    return len(body) if header is None else min(_number(header), len(body))


def _number(header: str | None) -> int:
    """The header's value; 0 where there is none, or none that the codec will accept."""
    return int(header[:18]) if header is not None and header.isascii() and header.isdigit() else 0


async def run_codec(services: Services, call: Callable[[], T], *, size_bytes: int) -> T:
    """Run a codec: small JSON at once, large JSON on the one JSON thread, since a parser holds the interpreter."""
    if size_bytes <= _INLINE_JSON_BYTES:
        return call()
    return await asyncio.get_running_loop().run_in_executor(services.json_thread, call)


def check_json_size(size_bytes: int, services: Services) -> None:
    """Refuse JSON over its own limit, which is lower than that of bodies. Raises PayloadTooLargeError."""
    limit = services.settings.max_json_bytes
    if size_bytes > limit:
        raise PayloadTooLargeError(
            f"body: expected at most {limit} bytes of JSON (NORMSERVE_MAX_JSON_BYTES), received {size_bytes}; "
            "send tensors in a binary encoding",
            limit_bytes=limit,
        )
