"""How a body's time is counted: what the sender takes, not what its reader takes."""

import asyncio

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from service.api.body import Stream
from service.errors import BodyTimeoutError

_TIMEOUT_S = 0.25


def _sender(*, chunk: bytes, count: int, pause_s: float = 0.0) -> Receive:
    left = count

    async def receive() -> Message:
        nonlocal left
        await asyncio.sleep(pause_s)
        left -= 1
        return {"type": "http.request", "body": chunk, "more_body": left > 0}

    return receive


async def test_what_the_reader_takes_is_not_the_senders_time() -> None:
    received = 0
    async for chunk in Stream(_sender(chunk=bytes(10), count=3), Headers(), timeout_s=_TIMEOUT_S):
        received += len(chunk)
        await asyncio.sleep(1.2 * _TIMEOUT_S)
    assert received == 30


async def test_a_trickle_that_never_stops_is_given_up() -> None:
    stream = Stream(_sender(chunk=b"1", count=100, pause_s=_TIMEOUT_S / 5), Headers(), timeout_s=_TIMEOUT_S)
    with pytest.raises(BodyTimeoutError, match="NORMSERVE_BODY_TIMEOUT_S"):
        async for _ in stream:
            pass


async def test_a_sender_that_brings_enough_may_take_long() -> None:
    stream = Stream(_sender(chunk=bytes(16 * 1024), count=4, pause_s=_TIMEOUT_S / 2), Headers(), timeout_s=_TIMEOUT_S)
    assert sum([len(chunk) async for chunk in stream]) == 64 * 1024
