"""Plain ASGI: routes that the framework must not parse, and sending an encoded body."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.api.compression import compress
from service.application.usage import Timing
from service.codecs.body import EncodedBody
from service.state import Services

_JOIN_BYTES = 64 * 1024
_LEAVE = "normserve.leave"
IS_WHOLE = "normserve.is_whole"  # in the scope once all of the body has come: `receive` brings it and does not wait


class Endpoint:
    """Makes a route take a coroutine function as an ASGI app; the router would call a bare function with a request."""

    def __init__(self, call: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(scope, receive, send)


def header(scope: Scope, name: bytes) -> str:
    """The first value of a header, "" without; a third of the cost of the framework's mapping where it is missing."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return ""


def headers_of(scope: Scope) -> dict[str, str]:
    """All headers by lower-case name, the first of several; for who asks for many, most of them missing.

    The blanks behind a value, which the parser leaves there, are none of it.
    """
    return {name.decode("latin-1"): value.decode("latin-1").rstrip() for name, value in reversed(scope["headers"])}


def services_of(scope: Scope) -> Services:
    """The services that the lifespan put into every scope."""
    services: Services = scope["state"]["services"]
    return services


class CancelledWhenClientLeaves:
    """Cancels what the block awaits as soon as the connection is lost; raises ClientDisconnect then.

    The connection calls back: watching `receive` instead would cost a task per request.
    """

    __slots__ = ("_has_left", "_scope", "_task")

    def __init__(self, scope: Scope) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._scope = scope
        self._task = task
        self._has_left = False

    def __enter__(self) -> None:
        self._scope[_LEAVE] = self._cancel

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        del self._scope[_LEAVE]
        if isinstance(error, asyncio.CancelledError) and self._has_left and self._task.uncancel() == 0:
            raise ClientDisconnect from None

    def _cancel(self) -> None:
        self._has_left = True
        self._task.cancel()


def leave(scope: Mapping[str, object]) -> None:
    """The client of this request is gone."""
    cancel = scope.get(_LEAVE)
    if callable(cancel):
        cancel()


async def send_tensors(send: Send, body: EncodedBody, timing: Timing, *, coding: str | None = None) -> None:
    """Answer 200: a small body in one piece, the chunks of a large one without joining them.

    The length of the JSON in the header counts its bytes before compression.
    """
    if coding is not None:
        compressed = await asyncio.to_thread(compress, body.chunks, coding)
        body = body._replace(chunks=[compressed], headers={**body.headers, "Content-Encoding": coding})
    await send({"type": "http.response.start", "status": 200, "headers": tensor_headers(body, timing)})
    *first, last = body.chunks if body.size_bytes > _JOIN_BYTES else [b"".join(body.chunks)]
    for chunk in first:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": last, "more_body": False})


def tensor_headers(body: EncodedBody, timing: Timing) -> list[tuple[bytes, bytes]]:
    """What stands before an encoded body."""
    headers = [
        (b"content-type", body.content_type.encode()),
        (b"content-length", str(body.size_bytes).encode()),
        (b"server-timing", _server_timing(timing)),
        (b"vary", b"Accept-Encoding"),
    ]
    if body.headers:
        headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in body.headers.items()]
    if body.json_length is not None:
        headers.append((b"inference-header-content-length", str(body.json_length).encode()))
    return headers


def _server_timing(timing: Timing) -> bytes:
    """The header's value; durations are in milliseconds."""
    return b"queue;dur=%.3f, decode;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f" % (
        timing.queue_ns / 1e6,
        timing.compute_input_ns / 1e6,
        timing.compute_infer_ns / 1e6,
        timing.compute_output_ns / 1e6,
    )
