"""Posting batches to statistics beside bare ASGI apps that take the same bytes: how much the statistics cost.

Usage: python -m benchmarks.statistics [--seconds S]. All run on uvicorn in a process of their own and take the same
bodies, in turn; `echo` sends them back, `receive` throws them away. `ratio` is our rate over theirs, the median of
pairs, with quartiles; the goal is 0.7 of the echo, counting its bytes one way. `keyed` posts carry an Idempotency-Key,
for which the body is hashed. The last line is what small posts to one resource cost after few and after many others.
"""

import argparse
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
from starlette.types import Receive, Scope, Send

from benchmarks.timing import compare
from tests.server import Server, running

_MIB = 2**20
CHANNELS = 64
BODIES_MIB = (1, 16, 64)
POSTS = 2000


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """The peers: /echo sends the body back, any other path throws it away."""
    if scope["type"] != "http":
        return
    kept, is_echo, more = [], scope["path"] == "/echo", True
    while more:
        message = await receive()
        kept += [message.get("body", b"")] if is_echo else []
        more = message.get("more_body", False)
    length = b"%d" % sum(map(len, kept))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    for chunk in kept:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def main(seconds: float) -> None:
    sys.stdout.write(f"{'body':<10}{'post':<8}{'peer':<9}{'ours GB/s':>10}{'peer GB/s':>11}{'ratio':>7}  quartiles\n")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "data") as server, _bare() as address:
        created = httpx.post(f"{server.url}/v1/statistics", json={"num_features": CHANNELS})
        path = f"{created.headers['location']}/batches"
        for size_mib, kind, peer in itertools.product(BODIES_MIB, ("plain", "keyed"), ("echo", "receive")):
            body = _npy(size_mib * _MIB)
            ours = _poster(server.address, path, body, is_keyed=kind == "keyed")
            found = compare(ours, _poster(address, f"/{peer}", body, is_keyed=False), seconds=seconds)
            rates = "".join(f"{len(body) / ms / 1e6:>11.2f}" for ms in (found.ours_ms, found.peer_ms))
            sys.stdout.write(f"{size_mib:>4} MiB  {kind:<8}{peer:<8}{rates}")
            sys.stdout.write(f"{1 / found.ratio:>7.2f}  {1 / found.high:.2f}-{1 / found.low:.2f}\n")
            sys.stdout.flush()
        _write_growth(server)


def _write_growth(server: Server) -> None:
    """Medians of posts to one resource, early and late ones, in milliseconds."""
    created = httpx.post(f"{server.url}/v1/statistics", json={"num_features": CHANNELS})
    post = _poster(server.address, f"{created.headers['location']}/batches", _npy(1), is_keyed=True)
    times_ms = []
    for _ in range(POSTS):
        started = time.perf_counter()
        post()
        times_ms.append(1000 * (time.perf_counter() - started))
    tenth = POSTS // 10
    early, late = (statistics.median(part) for part in (times_ms[tenth : 2 * tenth], times_ms[-tenth:]))
    sys.stdout.write(f"small keyed posts: {early:.2f} ms after {tenth}, {late:.2f} ms after {POSTS - tenth}\n")


def _npy(size_bytes: int) -> bytes:
    rows = max(1, size_bytes // (CHANNELS * 1024 * 4))
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
    command = [sys.executable, "-m", "uvicorn", "benchmarks.statistics:bare", "--port", str(port)]
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
