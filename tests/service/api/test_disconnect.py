"""A client that leaves: its queued work is dropped at once, the service and the others go on."""

import json
import socket
import struct
import time

import httpx
import numpy as np
import pytest

from tests.server import Server

INFER = "/v2/models/normcore.whitening/infer"


@pytest.fixture(scope="module")
def server_settings() -> dict[str, str]:
    # Slow work ends on a busy machine too.
    return {"NORMSERVE_THREADS": "1", "NORMSERVE_INFER_DEADLINE_S": "120"}


def _request(channels: int) -> bytes:
    """A whitening of `channels` channels: seconds of work for many, none for one."""
    tensor = np.random.default_rng(0).standard_normal((2 * channels + 2, channels)).astype(np.float32)
    inputs = [
        {
            "name": "input",
            "shape": tensor.shape,
            "datatype": "FP32",
            "parameters": {"binary_data_size": tensor.nbytes},
        }
    ]
    document = json.dumps({"inputs": inputs, "outputs": [{"name": "mean"}], "parameters": {"training": True}}).encode()
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(document) + tensor.nbytes}\r\n"
        f"Inference-Header-Content-Length: {len(document)}\r\n\r\n"
    )
    return head.encode() + document + tensor.tobytes()


def _send(server: Server, request: bytes) -> socket.socket:
    host, port = server.address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=120)
    connection.sendall(request)
    return connection


def _failures(server: Server) -> int:
    answer = httpx.get(f"{server.url}/v2/models/normcore.whitening/stats").json()
    return int(answer["model_stats"][0]["inference_stats"]["fail"]["count"])


@pytest.mark.parametrize("way", ["close", "reset"])
def test_work_that_waits_is_dropped_when_its_client_leaves(server: Server, way: str) -> None:
    before = _failures(server)
    slow = _send(server, _request(1500))
    time.sleep(0.2)  # the slow one runs
    waiting = [_send(server, _request(1)) for _ in range(5)]
    time.sleep(0.1)
    assert _failures(server) == before
    for connection in waiting:
        if way == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    time.sleep(0.05)
    assert _failures(server) == before + 5
    answer = slow.recv(12)
    slow.close()
    assert answer == b"HTTP/1.1 200"
    assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
    assert "Traceback" not in server.log.read_text()
