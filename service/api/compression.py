"""Content codings of tensor bodies: gzip and deflate, requests bounded as if they had come plain."""

import zlib
from collections.abc import AsyncIterator, Iterable, Mapping

from service.errors import MediaTypeError, PayloadMalformedError

CODINGS = ("gzip", "deflate")

_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_PIECE_BYTES = 256 * 1024
_LEVEL = 1


def request_coding(headers: Mapping[str, str]) -> str | None:
    """The coding of a request's body, None for identity. Raises MediaTypeError."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in CODINGS:
        raise MediaTypeError(
            f"Content-Encoding: expected {', '.join(CODINGS)} or identity, received {coding[:40]!r}",
            accept_encoding=", ".join(CODINGS),
        )
    return coding


async def decompressed(chunks: AsyncIterator[bytes], coding: str) -> AsyncIterator[bytes]:
    """The plain body in pieces of at most 256 KiB: who counts them stops a bomb early.

    Raises:
        PayloadMalformedError: the body is not what its coding says, or ends too early, or goes on after its end.
    """
    decoder = zlib.decompressobj(_WINDOW_BITS[coding])
    async for chunk in chunks:
        rest = chunk
        while rest:
            if decoder.eof:
                raise PayloadMalformedError(f"body: expected one {coding} stream, received bytes after its end")
            try:
                piece = decoder.decompress(rest, _PIECE_BYTES)
            except zlib.error as error:
                raise PayloadMalformedError(f"body: expected {coding}, received something else: {error}") from None
            rest = decoder.unconsumed_tail or (decoder.unused_data if decoder.eof else b"")
            yield piece
    if not decoder.eof:
        raise PayloadMalformedError(f"body: expected a whole {coding} stream, received its beginning")


def response_coding(headers: Mapping[str, str]) -> str | None:
    """The coding that a client asks for by naming gzip or deflate and nothing else.

    Many clients offer a list with every request; compressing tensors for them would cost far more than it saves.
    """
    wanted = headers.get("accept-encoding", "").strip().lower()
    return wanted if wanted in CODINGS else None


def compress(chunks: Iterable[bytes | memoryview], coding: str) -> bytes:
    encoder = zlib.compressobj(_LEVEL, wbits=_WINDOW_BITS[coding])
    return b"".join([*(encoder.compress(chunk) for chunk in chunks), encoder.flush()])
