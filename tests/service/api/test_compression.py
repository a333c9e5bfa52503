"""Content codings on both surfaces, and what a hostile sender makes of them."""

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.service.api.test_refusals import BATCH_NORM, INFER, refused
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)
ENCODERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


def _binary_request() -> tuple[bytes, int]:
    tensor = {"name": "input", "shape": [8, 3], "datatype": "FP32", "parameters": {"binary_data_size": ROWS.nbytes}}
    parameters = {"training": True, "binary_data_output": True}
    header = json.dumps({"inputs": [tensor], "outputs": [], "parameters": parameters}).encode()
    return header + ROWS.tobytes(), len(header)


@pytest.mark.parametrize("coding", ENCODERS)
async def test_a_compressed_request_is_answered_like_the_plain_one(client: httpx.AsyncClient, coding: str) -> None:
    body, json_length = _binary_request()
    headers = {"Inference-Header-Content-Length": str(json_length)}
    plain = await client.post(INFER, content=body, headers=headers)
    assert plain.status_code == 200, plain.text
    sent = ENCODERS[coding](body)
    answer = await client.post(INFER, content=sent, headers=headers | {"Content-Encoding": coding})
    assert answer.content == plain.content
    v1 = json.dumps({"input": ROWS.tolist(), "training": True}).encode()
    answers = [
        await client.post(BATCH_NORM, content=content, headers={"Content-Type": "application/json"} | extra)
        for content, extra in ((v1, {}), (ENCODERS[coding](v1), {"Content-Encoding": coding}))
    ]
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize("coding", ENCODERS)
async def test_an_answer_is_compressed_for_who_asks_for_just_that(client: httpx.AsyncClient, coding: str) -> None:
    body, json_length = _binary_request()
    headers = {"Inference-Header-Content-Length": str(json_length)}
    plain = await client.post(INFER, content=body, headers=headers | {"Accept-Encoding": "gzip, deflate, br"})
    assert "content-encoding" not in plain.headers
    assert plain.headers["vary"] == "Accept-Encoding"
    answer = await client.post(INFER, content=body, headers=headers | {"Accept-Encoding": coding})
    assert answer.headers["content-encoding"] == coding
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.content == plain.content  # httpx decodes it
    name = "inference-header-content-length"
    assert answer.headers[name] == plain.headers[name]


@pytest.mark.parametrize("coding", ENCODERS)
async def test_a_bomb_is_413_at_the_limit_of_plain_bytes(tmp_path: Path, coding: str) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        bomb = ENCODERS[coding](bytes(200_000_000))
        assert len(bomb) < 1_000_000
        answer = await client.post(INFER, content=bomb, headers={"Content-Encoding": coding})
        refused(answer, 413, "payload_too_large", "1000000")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"plain", "something else"),
        (gzip.compress(b"{}")[:-5], "its beginning"),
        (b"", "its beginning"),
        (gzip.compress(b"{}") + b"more", "after its end"),
    ],
    ids=["plain", "cut", "empty", "trailing"],
)
async def test_what_is_not_the_coding_is_400(client: httpx.AsyncClient, content: bytes, words: str) -> None:
    answer = await client.post(INFER, content=content, headers={"Content-Encoding": "gzip"})
    refused(answer, 400, "payload_malformed", words)


async def test_other_codings_are_415_and_say_which_work(client: httpx.AsyncClient) -> None:
    answer = await client.post(INFER, content=b"{}", headers={"Content-Encoding": "br"})
    refused(answer, 415, "media_type_unsupported", "br")
    assert answer.headers["accept-encoding"] == "gzip, deflate"
