"""Clients that are slow, silent or endless, against the real process."""

import io
import json
import socket
import time

import httpx
import numpy as np
import pytest

from tests.server import Server

ROWS = 2_000_000


@pytest.fixture(scope="module")
def server_settings() -> dict[str, str]:
    return {"NORMSERVE_BODY_TIMEOUT_S": "1"}


def _connected(server: Server) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _rest(connection: socket.socket) -> bytes:
    received = bytearray()
    try:
        while chunk := connection.recv(1 << 20):
            received += chunk
    except ConnectionResetError:
        pass
    return bytes(received)


@pytest.mark.parametrize("head", [b"", b"GET /v2 HT", b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_a_head_that_stops_arriving_ends_its_connection(server: Server, head: bytes) -> None:
    with _connected(server) as connection:
        connection.sendall(head)
        started = time.monotonic()
        assert _rest(connection) == b""
        assert time.monotonic() - started < 10


def test_a_head_without_end_is_refused(server: Server) -> None:
    with _connected(server) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-A: ")
        for size in (60_000, 10_000):
            time.sleep(0.2)  # so that all is read: a reset for unread bytes would overtake the answer
            connection.sendall(b"a" * size)
        head, _, body = _rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json\r\n" in head
    assert "65536" in json.loads(body)["error"]


def test_what_is_no_http_is_refused_in_the_form_of_every_error(server: Server) -> None:
    with _connected(server) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        content = json.loads(_rest(connection).partition(b"\r\n\r\n")[2])
    assert set(content) == {"error", "code", "request_id", "details"}


def test_a_client_that_takes_no_answer_is_dropped(server: Server) -> None:
    body = io.BytesIO()
    np.save(body, np.zeros((ROWS, 8), np.float32))
    head = (
        "POST /v1/normalizations/batch_norm?training=true HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/x-npy\r\nContent-Length: {len(body.getvalue())}\r\n\r\n"
    )
    with _connected(server) as connection:
        connection.sendall(head.encode() + body.getvalue())
        time.sleep(6)
        assert 0 < len(_rest(connection)) < ROWS * 8 * 4
    answer = httpx.post(
        f"{server.url}/v1/normalizations/batch_norm",
        params={"training": "true"},
        content=body.getvalue(),
        headers={"content-type": "application/x-npy"},
        timeout=60,
    )
    assert answer.status_code == 200
    assert len(answer.content) > ROWS * 8 * 4


def test_a_connection_is_kept_over_refusals(server: Server) -> None:
    refusal = b"POST /v2/models/nobody/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + bytes(200_000)
    last = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with _connected(server) as connection:
        connection.sendall(refusal * 2 + last)
        received = _rest(connection)
    assert received.count(b"HTTP/1.1 404 ") == 2
    assert received.count(b"HTTP/1.1 200 ") == 1
