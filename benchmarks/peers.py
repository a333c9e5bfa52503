"""What the service is measured beside: servers that a user would write by hand, each on uvicorn and one session.

Usage: python -m benchmarks.peers {fastapi,batcher,echo} [--model FILE]. It prints its port.
"""

import argparse
import asyncio
import socket
import sys
import threading
from collections import deque
from typing import Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.networks import IMAGE_SHAPE, TINY_INPUTS
from normcore.execution import open_session

_MAX_ROWS = 8


def fastapi_app(model: str) -> ASGIApp:
    """Raw float32 rows in and out. The tiny network runs on the loop: a thread would only cost it time."""
    session, app = open_session(_model(model), threads=1), FastAPI()

    @app.post("/infer")
    async def infer(request: Request) -> Response:
        rows = np.frombuffer(await request.body(), np.float32).reshape(-1, TINY_INPUTS)
        return Response(session.run(None, {"x": rows})[0].tobytes(), media_type="application/octet-stream")

    return app


class Batcher:
    """Images of one request each, whatever waits joined into batches, no protocol and no checks: the least there is."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._waiting: deque[tuple[bytes, asyncio.Future[bytes]]] = deque()
        self._changed = threading.Semaphore(0)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._run, daemon=True).start()
            await _lifespan(receive, send)
            return
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((await _body(receive), done))
        self._changed.release()
        await _answer(send, await done)

    def _run(self) -> None:
        assert self._loop is not None
        while True:
            self._changed.acquire()
            taken = [self._waiting.popleft()]
            while len(taken) < _MAX_ROWS and self._changed.acquire(blocking=False):
                taken.append(self._waiting.popleft())
            images = np.frombuffer(b"".join(body for body, _ in taken), np.float32).reshape(-1, *IMAGE_SHAPE)
            rows = self._session.run(None, {"x": images})[0]
            self._loop.call_soon_threadsafe(_deliver, taken, rows)


def _deliver(taken: list[tuple[bytes, asyncio.Future[bytes]]], rows: Any) -> None:
    for (_, done), row in zip(taken, rows, strict=True):
        done.set_result(row.tobytes())


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
    else:
        await _answer(send, await _body(receive))


async def _lifespan(receive: Receive, send: Send) -> None:
    for _ in range(2):
        message = await receive()
        await send({"type": f"{message['type']}.complete"})


async def _body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


async def _answer(send: Send, body: bytes) -> None:
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


def _model(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read()


def main(kind: str, model: str, threads: int) -> None:
    if kind == "fastapi":
        app = fastapi_app(model)
    else:
        app = echo if kind == "echo" else Batcher(open_session(_model(model), threads=threads))
    _Server(uvicorn.Config(app, port=0, log_config=None, access_log=False)).run()


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(f"{self.servers[0].sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("fastapi", "batcher", "echo"))
    parser.add_argument("--model", default="")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    main(options.kind, options.model, options.threads)
