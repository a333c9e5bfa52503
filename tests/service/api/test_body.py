"""A body in pieces: how its time is counted, what the sender takes and not its reader, and what it is in the end."""

import asyncio

import httpx
import numpy as np
import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from service.api.body import Stream
from service.errors import BodyTimeoutError
from tests.service.api.test_batches import pieces
from tests.service.api.test_refusals import INFER

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


@pytest.mark.parametrize("size", [1_000, 65_536, 300_000])
@pytest.mark.parametrize("is_declared", [True, False])
@pytest.mark.asyncio(loop_scope="session")
async def test_a_body_may_come_in_any_pieces(client: httpx.AsyncClient, size: int, is_declared: bool) -> None:
    tensor = np.random.default_rng(0).standard_normal((20_000, 8), np.float32)
    head = (
        f'{{"inputs": [{{"name": "input", "shape": [20000, 8], "datatype": "FP32", '
        f'"parameters": {{"binary_data_size": {tensor.nbytes}}}}}], '
        '"parameters": {"training": true, "binary_data_output": true}}'
    ).encode()
    content = head + tensor.tobytes()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    if is_declared:
        headers["Content-Length"] = str(len(content))
    answer = await client.post(INFER, content=pieces(content, size), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.content == (await client.post(INFER, content=content, headers=headers)).content
