"""Posting batches to statistics beside a bare ASGI receiver of the same bytes: how much the statistics cost.

Usage: python -m benchmarks.statistics [--seconds S]. Both run on uvicorn in a process of their own, and take the same
bodies over one connection each, in turn; the receiver throws them away. `ratio` is our rate over its rate, the median
of pairs, with quartiles: 1 is for free, the goal is 0.7. `keyed` posts carry an Idempotency-Key, whose body is hashed.
"""

import argparse
import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
from starlette.types import Receive, Scope, Send

from benchmarks.timing import compare
from tests.server import running

_MIB = 2**20
CHANNELS = 64
BODIES_MIB = (1, 16, 64, 256)


async def receiver(scope: Scope, receive: Receive, send: Send) -> None:
    """The peer: takes a body and answers how many bytes came."""
    if scope["type"] != "http":
        return
    total, more = 0, True
    while more:
        message = await receive()
        total += len(message.get("body", b""))
        more = message.get("more_body", False)
    text = str(total).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


def main(seconds: float) -> None:
    sys.stdout.write(f"{'body':<10}{'post':<8}{'ours GB/s':>10}{'bare GB/s':>11}{'ratio':>7}  quartiles\n")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "data") as server, _bare() as bare:
        created = httpx.post(f"{server.url}/v1/statistics", json={"num_features": CHANNELS})
        for size_mib, is_keyed in itertools.product(BODIES_MIB, (False, True)):
            body = _npy(size_mib * _MIB)
            found = compare(
                _poster(server.address, f"{created.headers['location']}/batches", body, is_keyed=is_keyed),
                _poster(bare, "/", body, is_keyed=False),
                seconds=seconds,
            )
            ours, peer = (len(body) / ms / 1e6 for ms in (found.ours_ms, found.peer_ms))
            kind = "keyed" if is_keyed else "plain"
            sys.stdout.write(f"{size_mib:>4} MiB  {kind:<8}{ours:>10.2f}{peer:>11.2f}")
            sys.stdout.write(f"{1 / found.ratio:>7.2f}  {1 / found.high:.2f}-{1 / found.low:.2f}\n")
            sys.stdout.flush()


def _npy(size_bytes: int) -> bytes:
    rows = size_bytes // (CHANNELS * 1024 * 4)
    file = BytesIO()
    np.save(file, np.random.default_rng(0).standard_normal((rows, CHANNELS, 32, 32), np.float32))
    return file.getvalue()


def _poster(address: str, path: str, body: bytes, *, is_keyed: bool) -> Callable[[], None]:
    numbers = itertools.count()

    def post() -> None:
        connection = HTTPConnection(address, timeout=60)
        headers = {"Content-Type": "application/x-npy"}
        if is_keyed:
            headers["Idempotency-Key"] = f"{len(body)} {next(numbers)}"
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.status != 200:
            raise RuntimeError(content.decode())

    return post


@contextmanager
def _bare() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.statistics:receiver", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--log-level", "error", "--no-access-log", "--lifespan", "off"], env=os.environ
    )
    try:
        transport = httpx.HTTPTransport(retries=10)
        with httpx.Client(transport=transport) as client:
            client.post(f"http://127.0.0.1:{port}/", content=b"1")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each row of the table")
    main(parser.parse_args().seconds)
