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
        connection.settimeout(120)  # a first request may have to compile
        assert connection.recv(1) == b"H"
        time.sleep(6)
        assert len(_rest(connection)) < ROWS * 8 * 4
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


def test_blanks_behind_a_headers_value_are_none_of_it(server: Server) -> None:
    tensor = {"name": "input", "shape": [2, 2], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    text = json.dumps({"inputs": [tensor], "parameters": {"normalized_shape": "2"}}).encode()
    head = f"Inference-Header-Content-Length:\t{len(text)} \t\r\nContent-Length: {len(text) + 16} \r\n"
    with _connected(server) as connection:
        connection.sendall(b"POST /v2/models/normcore.layer_norm/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
        connection.sendall(head.encode() + b"\r\n" + text + bytes(16))
        received = _rest(connection)
    assert received.startswith(b"HTTP/1.1 200 OK"), received


OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
POST = "POST /v1/normalizations/layer_norm HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = '{"input": [[1, 3]], "outputs": ["mean"]}'
WHOLE = f"{POST}{OFFER}Content-Length: {len(BODY)}\r\n\r\n{BODY}"
LAST = "GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "count"),
    [
        ((WHOLE,), 1),
        ((WHOLE * 300,), 300),
        ((WHOLE[:60], WHOLE[60:-20], WHOLE[-20:], WHOLE), 2),
        ((f"{POST}{OFFER}Transfer-Encoding: chunked\r\n\r\n{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n",), 1),
        ((WHOLE.replace("h2c", "websocket"),), 1),
    ],
    ids=["whole", "many at once", "in pieces", "chunked", "websocket"],
)
def test_an_offer_to_upgrade_costs_no_body(server: Server, pieces: tuple[str, ...], count: int) -> None:
    """Java's client makes one by default, and curl --http2; the connection stays what it was."""
    with _connected(server) as connection:
        for piece in pieces:
            connection.sendall(piece.encode())
            time.sleep(0.1)
        connection.sendall(LAST.encode())
        received = _rest(connection)
    assert received.count(b"HTTP/1.1 200 OK") == count + 1
    assert received.count(b'"data":[2.0]') == count


def test_an_offer_keeps_what_else_the_connection_is_told(server: Server) -> None:
    with _connected(server) as connection:
        connection.sendall(WHOLE.replace("Connection: ", "Connection: close, ").encode())
        received = _rest(connection)
    assert received.count(b"HTTP/1.1 200 OK") == 1
    assert b"connection: close" in received


def test_a_tunnel_is_refused(server: Server) -> None:
    with _connected(server) as connection:
        connection.sendall(b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 4")
