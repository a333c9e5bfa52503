"""Receiving bodies: bounded in bytes and in silence, before and while they are read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from service.api.compression import decompressed, request_coding
from service.errors import BodyTimeoutError, MediaTypeError, PayloadMalformedError, PayloadTooLargeError
from service.state import Services

_ALIGNMENT = 16
_PROGRESS_BYTES = 16 * 1024
_SMALL_BYTES = 1024 * 1024
_FIRST_BYTES = 64 * 1024


class Received:
    """A context with a whole large body; its bytes count against the receive budget until the context ends.

    The byte at offset `aligned_at` lies at a multiple of 16 in memory, so that tensors that begin there need no copy.
    With `is_whole` the first message brings all of the body without a wait; most small bodies come with their heads.
    It has at most `max_bytes` or, without, NORMSERVE_MAX_BODY_BYTES; `setting` names where they come from.
    """

    __slots__ = (
        "_aligned_at",
        "_budget",
        "_headers",
        "_is_whole",
        "_max_bytes",
        "_receive",
        "_reserved_bytes",
        "_setting",
        "_timeout_s",
    )

    def __init__(
        self,
        receive: Receive,
        headers: Mapping[str, str],
        services: Services,
        *,
        aligned_at: int = 0,
        is_whole: bool = False,
        max_bytes: int | None = None,
        setting: str = "NORMSERVE_MAX_BODY_BYTES",
    ) -> None:
        self._receive = receive
        self._headers = headers
        self._timeout_s = services.settings.body_timeout_s
        self._max_bytes = services.settings.max_body_bytes if max_bytes is None else max_bytes
        self._setting = setting
        self._budget = services.budget
        self._aligned_at = aligned_at
        self._is_whole = is_whole
        self._reserved_bytes = 0

    async def __aenter__(self) -> memoryview:
        declared = _declared_length(self._headers)
        _check_size(declared or 0, self._max_bytes, self._setting)
        coding = request_coding(self._headers)
        self._reserve(0 if declared is None or coding else declared)
        try:
            return await self._read(coding, _FIRST_BYTES if declared is None or coding else declared)
        except BaseException:
            self._budget.release(self._reserved_bytes)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._budget.release(self._reserved_bytes)

    def _reserve(self, size_bytes: int) -> None:
        """So many bytes in all: a body whose length nobody has told counts as it comes."""
        if size_bytes > self._reserved_bytes:
            self._budget.reserve(size_bytes - self._reserved_bytes)
            self._reserved_bytes = size_bytes

    async def _read(self, coding: str | None, expected_bytes: int) -> memoryview:
        padding = -self._aligned_at % _ALIGNMENT
        if self._is_whole and coding is None:
            whole = bytearray(padding)
            whole += _chunk(await self._receive())
            _check_size(len(whole) - padding, self._max_bytes, self._setting)
            return memoryview(whole)[padding:]
        body = _Buffer(padding, expected_bytes)
        chunks: AsyncIterator[bytes] = Stream(self._receive, self._headers, timeout_s=self._timeout_s)
        if coding is not None:
            chunks = decompressed(chunks, coding)
        async for chunk in chunks:
            body.append(chunk)
            _check_size(body.size_bytes, self._max_bytes, self._setting)
            self._reserve(body.size_bytes)
        return body.content


class _Buffer:
    """Bytes as they come, behind some padding, in memory that is taken at once and touched only as they come.

    A bytearray that grows is copied each time by an eighth, which for 8 MiB is some twenty times.
    """

    __slots__ = ("_end", "_memory", "_start")

    def __init__(self, padding: int, expected_bytes: int) -> None:
        self._start = self._end = padding
        self._memory = np.empty(padding + expected_bytes, np.uint8).data

    @property
    def size_bytes(self) -> int:
        return self._end - self._start

    @property
    def content(self) -> memoryview:
        return self._memory[self._start : self._end]

    def append(self, chunk: bytes) -> None:
        start, self._end = self._end, self._end + len(chunk)
        if self._end > len(self._memory):
            taken, self._memory = self._memory, np.empty(2 * self._end, np.uint8).data
            self._memory[:start] = taken[:start]
        self._memory[start : self._end] = chunk


async def received_stream(
    receive: Receive, headers: Mapping[str, str], services: Services
) -> AsyncGenerator[bytes, None]:
    """A tensor body in pieces, which nobody holds as a whole; at most NORMSERVE_MAX_STREAM_BYTES."""
    settings = services.settings
    _check_size(_declared_length(headers) or 0, settings.max_stream_bytes, "NORMSERVE_MAX_STREAM_BYTES")
    _check_encoding(headers)
    total = 0
    async for chunk in Stream(receive, headers, timeout_s=settings.body_timeout_s):
        total += len(chunk)
        _check_size(total, settings.max_stream_bytes, "NORMSERVE_MAX_STREAM_BYTES")
        yield chunk


async def received_small(receive: Receive, headers: Mapping[str, str], services: Services) -> bytes:
    """A whole management document, at most 1 MiB."""
    _check_encoding(headers)
    body = bytearray()
    async for chunk in Stream(receive, headers, timeout_s=services.settings.body_timeout_s):
        body += chunk
        _check_size(len(body), _SMALL_BYTES, "a management document")
    return bytes(body)


class Stream(AsyncIterator[bytes]):
    """Chunks as they come. A sender must bring 16 KiB, or the end, in every `timeout_s` seconds that we wait for it.

    A class, not an async generator: the event loop keeps account of every generator, which costs a small request more
    than its body does.
    """

    def __init__(self, receive: Receive, headers: Mapping[str, str], *, timeout_s: float) -> None:
        self._receive = receive
        self._headers = headers
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._remaining_s = timeout_s
        self._total = self._fresh = 0
        self._is_complete = False

    async def __anext__(self) -> bytes:
        while not self._is_complete:
            chunk = await self._next()
            if chunk:
                return chunk
        raise StopAsyncIteration

    async def _next(self) -> bytes:
        asked = self._loop.time()
        try:
            async with asyncio.timeout_at(asked + self._remaining_s):
                message = await self._receive()
        except TimeoutError:
            length = self._headers.get("content-length", "unknown")
            raise BodyTimeoutError(
                f"body: stopped arriving; received {self._total} of {length} bytes, and too little within "
                f"{self._timeout_s:g} s (NORMSERVE_BODY_TIMEOUT_S)"
            ) from None
        chunk = _chunk(message)
        self._is_complete = not message.get("more_body", False)
        self._total += len(chunk)
        self._fresh += len(chunk)
        self._remaining_s -= self._loop.time() - asked
        if self._fresh >= _PROGRESS_BYTES:
            self._fresh, self._remaining_s = 0, self._timeout_s
        return chunk


def _chunk(message: Message) -> bytes:
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    chunk: bytes = message.get("body", b"")
    return chunk


def _declared_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None if "transfer-encoding" in headers else 0
    text = text.strip()
    if not text.isascii() or not text.isdigit():
        raise PayloadMalformedError(f"Content-Length: expected a number of bytes, received {text[:40]!r}")
    return int(text)


def _check_size(size: int, limit: int, setting: str) -> None:
    if size > limit:
        raise PayloadTooLargeError(
            f"body: expected at most {limit} bytes ({setting}), received {size} or more", limit_bytes=limit
        )


def _check_encoding(headers: Mapping[str, str]) -> None:
    coding = request_coding(headers)
    if coding is not None:
        raise MediaTypeError(f"Content-Encoding: expected identity, received {coding!r}; send the body uncompressed")
