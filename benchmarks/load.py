"""Load on an HTTP server: `wrk` where it is installed, else and for open loops a small client of our own.

An HTTP library would cost more than the service it measures.
"""

import asyncio
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

_SCRIPT = """
local file = io.open(os.getenv("LOAD_BODY"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
for name, value in string.gmatch(os.getenv("LOAD_HEADERS"), "([^:\\n]+): ([^\\n]+)") do wrk.headers[name] = value end
function done(summary, latency, requests)
  io.write(string.format('\\nDONE {"requests": %d, "us": %d, "failures": %d, "p50": %f, "p99": %f}\\n',
    summary.requests, summary.duration, summary.errors.status + summary.errors.timeout + summary.errors.read,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True, slots=True)
class Call:
    """One request, sent over and over."""

    port: int
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The request on the wire; a GET where there is no body."""
        method = "POST" if self.body else "GET"
        lines = [f"{method} {self.path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True, slots=True)
class Load:
    """Requests answered 200 per second, their latency in milliseconds, and how many were not."""

    rate: float
    p50_ms: float
    p99_ms: float
    failures: int


class Exchange(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self) -> None:
        self._head = b""
        self._chunks: list[bytes] = []
        self._missing_bytes = 0
        self._waiting: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._missing_bytes:
            self._chunks.append(data)
            self._missing_bytes -= len(data)
        else:
            self._head, mark, body = (self._head + data).partition(b"\r\n\r\n")
            if not mark:
                return
            length = self._head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self._chunks = [body]
            self._missing_bytes = int(length) - len(body)
        if self._missing_bytes == 0 and self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            head, self._head = self._head, b""
            waiting.set_result((int(head[9:12]), head))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(exc or ConnectionError("the server closed the connection"))

    @property
    def body(self) -> bytes:
        """Of the last answer."""
        return b"".join(self._chunks)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and head of the answer."""
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


async def connected(port: int) -> Exchange:
    _, exchange = await asyncio.get_running_loop().create_connection(Exchange, "127.0.0.1", port)
    return exchange


def closed_loop(call: Call, *, connections: int, seconds: float) -> Load:
    """Every connection asks again as soon as it is answered."""
    wrk = shutil.which("wrk")
    if wrk is None or not call.body:
        return asyncio.run(own_closed_loop(call, connections=connections, seconds=seconds))
    with tempfile.TemporaryDirectory() as folder:
        script, body = Path(folder, "load.lua"), Path(folder, "body")
        script.write_text(_SCRIPT)
        body.write_bytes(call.body)
        headers = "\n".join(f"{name}: {value}" for name, value in call.headers.items())
        command = [wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", "--timeout", "60", "-s", str(script)]
        environment = {"LOAD_BODY": str(body), "LOAD_HEADERS": headers}
        url = f"http://127.0.0.1:{call.port}{call.path}"
        output = subprocess.run([*command, url], env=environment, capture_output=True, text=True, check=True).stdout
    done = json.loads(output.partition("\nDONE ")[2])
    rate = (done["requests"] - done["failures"]) / done["us"] * 1e6
    return Load(rate, done["p50"] / 1e3, done["p99"] / 1e3, done["failures"])


async def own_closed_loop(call: Call, *, connections: int, seconds: float) -> Load:
    request, latencies_ms, failures = call.to_bytes(), list[float](), 0
    end = time.perf_counter() + seconds

    async def ask() -> None:
        nonlocal failures
        exchange = await connected(call.port)
        while (started := time.perf_counter()) < end:
            status, _ = await exchange.ask(request)
            latencies_ms.append((time.perf_counter() - started) * 1e3)
            failures += status != 200
        exchange.close()

    started = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(connections)))
    rate = (len(latencies_ms) - failures) / (time.perf_counter() - started)
    return Load(rate, *percentiles(latencies_ms), failures)


@dataclass(frozen=True, slots=True)
class Offered:
    """An open loop's answers by status: how many, and their latency in milliseconds."""

    seconds: float
    counts: Counter[int]
    latencies_ms: dict[int, list[float]]
    are_refusals_dated: bool


async def open_loop(call: Call, *, rate: float, seconds: float) -> Offered:
    """Ask at a fixed rate, however long the answers take; latency counts from when a request was due."""
    request, free, tasks = call.to_bytes(), list[Exchange](), set[asyncio.Task[None]]()
    counts, latencies_ms, are_dated = Counter[int](), dict[int, list[float]](), True

    async def ask(due: float) -> None:
        nonlocal are_dated
        exchange = free.pop() if free else await connected(call.port)
        status, head = await exchange.ask(request)
        latencies_ms.setdefault(status, []).append((time.perf_counter() - due) * 1e3)
        counts[status] += 1
        are_dated &= status != 429 or b"retry-after: " in head.lower()
        free.append(exchange)

    started = time.perf_counter()
    for number in range(round(rate * seconds)):
        due = started + number / rate
        if (early_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(early_s)
        task = asyncio.create_task(ask(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    elapsed_s = time.perf_counter() - started
    for exchange in free:
        exchange.close()
    return Offered(elapsed_s, counts, latencies_ms, are_dated)


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (float("nan"), float("nan"))
    return statistics.median(values), statistics.quantiles(values, n=100, method="inclusive")[98]
