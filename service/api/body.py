"""Receiving bodies: bounded in bytes and in silence, before and while they are read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.errors import BodyTimeoutError, MediaTypeError, PayloadMalformedError, PayloadTooLargeError
from service.state import Services

_ALIGNMENT = 16
_PROGRESS_BYTES = 16 * 1024
_SMALL_BYTES = 1024 * 1024


@asynccontextmanager
async def received(
    receive: Receive, headers: Headers, services: Services, *, aligned_at: int = 0
) -> AsyncIterator[memoryview]:
    """A whole tensor body; its bytes count against the receive budget until the context ends.

    The byte at offset `aligned_at` lies at a multiple of 16 in memory, so that tensors that begin there need no copy.
    """
    settings = services.settings
    declared = _declared_length(headers)
    _check_size(declared or 0, settings.max_body_bytes, "NORMSERVE_MAX_BODY_BYTES")
    _check_encoding(headers)
    # A body of unknown length may grow to the limit, so it is counted as that much from the start.
    expected = settings.max_body_bytes if declared is None else declared
    padding = -aligned_at % _ALIGNMENT
    with services.budget.reserve(expected) if expected else nullcontext():
        body = bytearray(padding)
        async for chunk in stream(receive, headers, timeout_s=settings.body_timeout_s):
            body += chunk
            _check_size(len(body) - padding, settings.max_body_bytes, "NORMSERVE_MAX_BODY_BYTES")
        yield memoryview(body)[padding:]


async def received_stream(receive: Receive, headers: Headers, services: Services) -> AsyncGenerator[bytes, None]:
    """A tensor body in pieces, which nobody holds as a whole; at most NORMSERVE_MAX_STREAM_BYTES."""
    settings = services.settings
    _check_size(_declared_length(headers) or 0, settings.max_stream_bytes, "NORMSERVE_MAX_STREAM_BYTES")
    _check_encoding(headers)
    total = 0
    async for chunk in stream(receive, headers, timeout_s=settings.body_timeout_s):
        total += len(chunk)
        _check_size(total, settings.max_stream_bytes, "NORMSERVE_MAX_STREAM_BYTES")
        yield chunk


async def received_small(receive: Receive, headers: Headers, services: Services) -> bytes:
    """A whole management document, at most 1 MiB."""
    _check_encoding(headers)
    body = bytearray()
    async for chunk in stream(receive, headers, timeout_s=services.settings.body_timeout_s):
        body += chunk
        _check_size(len(body), _SMALL_BYTES, "a management document")
    return bytes(body)


async def stream(receive: Receive, headers: Headers, *, timeout_s: float) -> AsyncIterator[bytes]:
    """Chunks as they come. A sender must bring 16 KiB, or the end, in every `timeout_s` seconds that we wait for it."""
    total = fresh = 0
    loop = asyncio.get_running_loop()
    limit = loop.time() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(limit):
                message = await receive()
        except TimeoutError:
            length = headers.get("content-length", "unknown")
            raise BodyTimeoutError(
                f"body: stopped arriving; received {total} of {length} bytes, and too little within {timeout_s:g} s "
                "(NORMSERVE_BODY_TIMEOUT_S)"
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        if chunk:
            total += len(chunk)
            fresh += len(chunk)
            if fresh >= _PROGRESS_BYTES:
                fresh, limit = 0, loop.time() + timeout_s
            taken = loop.time()
            yield chunk
            limit += loop.time() - taken  # the time that the reader took is not the sender's
        if not message.get("more_body", False):
            return


def _declared_length(headers: Headers) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None if "transfer-encoding" in headers else 0
    if not text.isascii() or not text.isdigit():
        raise PayloadMalformedError(f"Content-Length: expected a number of bytes, received {text[:40]!r}")
    return int(text)


def _check_size(size: int, limit: int, setting: str) -> None:
    if size > limit:
        raise PayloadTooLargeError(
            f"body: expected at most {limit} bytes ({setting}), received {size} or more", limit_bytes=limit
        )


def _check_encoding(headers: Headers) -> None:
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise MediaTypeError(
            f"Content-Encoding: expected identity, received {coding[:40]!r}; send the body uncompressed"
        )
