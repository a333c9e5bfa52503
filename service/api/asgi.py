"""Plain ASGI: routes that the framework must not parse, and sending an encoded body."""

from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

from service.codecs.body import EncodedBody
from service.state import Services

_JOIN_BYTES = 64 * 1024


class Endpoint:
    """Makes a route take a coroutine function as an ASGI app; the router would call a bare function with a request."""

    def __init__(self, call: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(scope, receive, send)


def services_of(scope: Scope) -> Services:
    """The services that the lifespan put into every scope."""
    services: Services = scope["state"]["services"]
    return services


async def send_body(send: Send, body: EncodedBody) -> None:
    """Answer 200: a small body in one piece, the chunks of a large one without joining them."""
    length = sum(len(chunk) for chunk in body.chunks)
    headers = [(b"content-type", body.content_type.encode()), (b"content-length", str(length).encode())]
    headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in body.headers.items()]
    if body.json_length is not None:
        headers.append((b"inference-header-content-length", str(body.json_length).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    *first, last = body.chunks if length > _JOIN_BYTES else [b"".join(body.chunks)]
    for chunk in first:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": last, "more_body": False})
