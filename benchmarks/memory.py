"""Whether memory stays where it was: cycles of load, infer and unload, and requests of many shapes."""

import asyncio
import statistics
import sys
from collections.abc import Sequence
from itertools import cycle

import numpy as np

from benchmarks.load import connected
from benchmarks.networks import TINY_INPUTS, perceptron
from benchmarks.servers import Server, binary_call, service

MIB = 1024**2
CYCLES = 500
REQUESTS = 10_000
_ROWS = (1, 3, 17, 64, 255, 1024, 4096)


def cycles(server: Server, count: int) -> list[int]:
    """Resident bytes after each of `count` cycles of load, infer and unload of one model."""
    path = server.serve("cycled", perceptron(hidden=1024, layers=4))
    call = binary_call(server.port, path, "x", np.ones((256, TINY_INPUTS), np.float32))
    found = []
    for _ in range(count):
        server.ask("POST", "/v2/repository/models/cycled/load", b"{}")
        asyncio.run(_asked([call.to_bytes()], server.port, 3))
        server.ask("POST", "/v2/repository/models/cycled/unload", b"{}")
        found.append(server.memory_bytes())
    return found


def shapes(server: Server, count: int, *, samples: int) -> list[int]:
    """Resident bytes after each of `samples` parts of `count` requests with ever other numbers of rows."""
    path = server.serve("shapes", perceptron(hidden=512, layers=2))
    calls = [binary_call(server.port, path, "x", np.ones((rows, TINY_INPUTS), np.float32)).to_bytes() for rows in _ROWS]
    found = []
    for _ in range(samples):
        asyncio.run(_asked(calls, server.port, count // samples))
        found.append(server.memory_bytes())
    return found


async def _asked(requests: Sequence[bytes], port: int, count: int) -> None:
    exchange = await connected(port)
    for _, request in zip(range(count), cycle(requests), strict=False):
        status, _ = await exchange.ask(request)
        if status != 200:
            raise RuntimeError(f"answered {status}")
    exchange.close()


def report(_: int, __: float) -> None:
    """Goal 8: resident memory over cycles of load, infer and unload, and over requests of mixed shapes."""
    with service() as server:
        found = cycles(server, CYCLES)
        early, late = (statistics.median(found[start : start + 50]) / MIB for start in (CYCLES // 10, CYCLES - 50))
        _say(f"  {CYCLES} cycles: {early:.1f} MiB early, {late:.1f} MiB late, {late - early:+.1f} MiB")
    with service() as server:
        found = shapes(server, REQUESTS, samples=50)
        early, late = (statistics.median(found[start : start + 5]) / MIB for start in (5, 45))
        _say(f"  {REQUESTS} requests: {early:.1f} MiB early, {late:.1f} MiB late, {late - early:+.1f} MiB")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
