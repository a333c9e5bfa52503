"""Small inferences of brief models that their connections answer; everything else is left to the app."""

import asyncio
import gc
import gzip
import json
import logging
import re
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import pytest_asyncio
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from benchmarks.load import connected
from service.api.connection import Connection
from service.app import create_app
from service.engine import pace
from service.settings import Settings
from tests.service.conftest import small_settings
from tests.service.engine import graphs

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROW = np.array([[1.5, -2.0, 3.0]], np.float32)
BODY_TIMEOUT_S = 5.0
CLIENTS = 16
REQUESTS = 20
PATIENCE_S = 30.0


class Socket:
    def setsockopt(self, *_: object) -> None: ...

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 80

    getpeername = getsockname


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"socket": Socket()})
        self.written = b""
        self.is_closed = False
        self.has_changed = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        self.has_changed.set()

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@dataclass
class Service:
    """The app inside its lifespan with connections in front of it; `passed` counts the requests that reached it."""

    app: ASGIApp
    state: dict[str, Any]
    passed: int = 0
    server_state: ServerState = field(default_factory=ServerState)

    def protocol(self) -> Connection:
        http = Connection.within(BODY_TIMEOUT_S)
        config = uvicorn.Config(self._counted, http=http, interface="asgi3", lifespan="off", log_config=None)
        config.load()
        return http(config, self.server_state, self.state)

    def connect(self) -> tuple[Connection, Transport]:
        connection, transport = self.protocol(), Transport()
        connection.connection_made(transport)
        return connection, transport

    async def ask(self, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
        connection, transport = self.connect()
        for piece in pieces:
            connection.data_received(piece)
            await asyncio.sleep(0)
        (answer,) = await answers(transport, 1)
        connection.connection_lost(None)
        return answer

    async def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return await self.ask(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.passed += 1
        await self.app(scope, receive, send)


async def answers(transport: Transport, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    async with asyncio.timeout(30):
        while (found := _parsed(transport.written)) is None or len(found) < count:
            transport.has_changed.clear()
            await transport.has_changed.wait()
    return found


def _parsed(written: bytes) -> list[tuple[int, dict[str, str], bytes]] | None:
    found = []
    while written:
        head, mark, rest = written.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name: value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", -1))
        if not mark or length > len(rest):
            return None
        found.append((int(first.split()[1]), headers, rest[:length]))
        written = rest[length:]
    return found


def request(
    model: str = "brief",
    *,
    row: np.ndarray[Any, Any] = ROW,
    path: str = "",
    headers: str = "",
    coding: str = "",
    **changes: Any,
) -> bytes:
    entry = {"name": "x", "shape": row.shape, "datatype": "FP32", "parameters": {"binary_data_size": row.nbytes}}
    document = {"inputs": [entry], "parameters": {"binary_data_output": True}} | changes
    text = json.dumps({key: value for key, value in document.items() if value is not None}).encode()
    body = text + row.tobytes()
    if coding:
        body, headers = gzip.compress(body), f"{headers}content-encoding: {coding}\r\n"
    return (
        f"POST {path or f'/v2/models/{model}/infer'} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        f"inference-header-content-length: {len(text)}\r\n{headers}\r\n"
    ).encode() + body


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Service]:
    """A service for which what it has run is brief, however busy the machine is."""
    app = create_app(settings)
    async with AsyncExitStack() as stack:
        stack.enter_context(patch.object(pace, "_BRIEF_S", 60.0))
        state = await stack.enter_async_context(app.router.lifespan_context(app))
        service = Service(app, dict(cast("dict[str, Any]", state)))
        checkpoint = json.loads((await service.post("/v1/checkpoints", graphs.doubling().SerializeToString()))[2])["id"]
        for name in ("brief", "other"):
            document = {"name": name, "checkpoint": checkpoint, "fold": False}
            assert (await service.post("/v1/models", json.dumps(document).encode()))[0] == 201
            for _ in range(200):  # until it is known to be brief
                before = service.passed
                await service.ask(request(name))
                if service.passed == before:
                    break
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(small_settings(tmp_path_factory.mktemp("shortcut"))) as started:
        yield started


async def _counts(service: Service, name: str) -> tuple[int, int, int]:
    document = json.loads((await service.ask(f"GET /v2/models/{name}/stats HTTP/1.1\r\nhost: x\r\n\r\n".encode()))[2])
    (stats,) = document["model_stats"]
    executed = sum(batch["compute_infer"]["count"] for batch in stats["batch_stats"])
    assert executed == stats["execution_count"]
    return stats["inference_count"], stats["execution_count"], stats["inference_stats"]["success"]["count"]


async def test_the_answer_is_the_apps_but_for_times_and_id(service: Service) -> None:
    before = service.passed
    short = await service.ask(request(id="7"))
    assert service.passed == before
    whole = await service.ask(request(id="7", parameters={"binary_data_output": True, "priority": 0}))
    assert service.passed == before + 1
    (status, headers, body), (same_status, same_headers, same_body) = short, whole
    assert (status, body) == (same_status, same_body)
    assert json.loads(body[: int(headers["inference-header-content-length"])])["id"] == "7"
    assert np.frombuffer(body[-24:], np.float32).tolist() == [3.0, -4.0, 6.0, -1.5, 2.0, -3.0]
    assert list(headers) == list(same_headers)
    for name in ("server-timing", "x-request-id"):
        assert headers.pop(name) != same_headers.pop(name)
    assert headers == same_headers


async def _counters(service: Service, model: str) -> dict[str, float]:
    """What /metrics counts of a model, but for times."""
    text = (await service.ask(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"))[2].decode()
    samples = [line.rpartition(" ") for line in text.splitlines() if f'model="{model}"' in line]
    return {name: float(value) for name, _, value in samples if "duration" not in name or "_count{" in name}


async def test_what_is_counted_is_the_same_with_and_without(service: Service) -> None:
    found = []
    for message, is_passed in ((request(), False), (request(headers="origin: http://x\r\n"), True)):
        before, passed = await _counters(service, "brief"), service.passed
        assert (await service.ask(message))[0] == 200
        assert service.passed - passed == is_passed
        after = await _counters(service, "brief")
        found.append({name: value - before[name] for name, value in after.items() if value != before[name]})
    assert found[0] == found[1]
    assert sum(name.startswith("nv_inference_") for name in found[0]) == 3
    assert sum(name.startswith("normserve_") for name in found[0]) >= 5


async def _ask_together(service: Service, rows: list[np.ndarray[Any, Any]]) -> None:
    pairs = [service.connect() for _ in rows]
    for (connection, _), row in zip(pairs, rows, strict=True):
        connection.data_received(request(row=row))
    for (connection, transport), row in zip(pairs, rows, strict=True):
        ((status, _, body),) = await answers(transport, 1)
        assert status == 200
        found = np.frombuffer(body[-2 * row.nbytes :], np.float32).reshape(2, *row.shape)
        np.testing.assert_array_equal(found, [2 * row, -row])
        connection.connection_lost(None)


async def test_requests_of_one_turn_are_joined_and_counted(service: Service) -> None:
    rows = [np.full((number % 3 + 1, 3), number, np.float32) for number in range(12)]
    for _ in range(200):  # until so many rows, too, are known to be brief
        before, passed = await _counts(service, "brief"), service.passed
        await _ask_together(service, rows)
        if service.passed == passed:
            break
    assert service.passed == passed
    after = await _counts(service, "brief")
    inferences, executions, requests = (now - then for now, then in zip(after, before, strict=True))
    assert (inferences, requests) == (sum(map(len, rows)), len(rows))
    assert executions == 1


async def _ask_over_and_over(port: int) -> None:
    exchange = await connected(port)
    for _ in range(REQUESTS):
        status, _ = await exchange.ask(request())
        assert status == 200
        np.testing.assert_array_equal(np.frombuffer(exchange.body[-ROW.nbytes :], np.float32), -ROW[0])
    exchange.close()


@pytest.mark.no_cover
@pytest.mark.alone
async def test_many_clients_share_executions(service: Service) -> None:
    server = await asyncio.get_running_loop().create_server(service.protocol, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        fewest_passed = fewest_executions = CLIENTS * REQUESTS
        end = asyncio.get_running_loop().time() + PATIENCE_S
        # Until as many rows as come are known to be brief, and the machine has let them come together.
        while asyncio.get_running_loop().time() < end:
            before, passed = await _counts(service, "brief"), service.passed
            await asyncio.gather(*(_ask_over_and_over(port) for _ in range(CLIENTS)))
            counts = zip(await _counts(service, "brief"), before, strict=True)
            inferences, executions, _ = (now - then for now, then in counts)
            assert inferences == CLIENTS * REQUESTS
            fewest_passed = min(fewest_passed, service.passed - passed)
            fewest_executions = min(fewest_executions, executions)
            if fewest_passed < inferences / 2 and fewest_executions <= inferences / 3:
                break
    assert fewest_passed < CLIENTS * REQUESTS / 2
    assert fewest_executions <= CLIENTS * REQUESTS / 3


async def test_models_of_one_turn_are_run_apart(service: Service) -> None:
    first, second = service.connect(), service.connect()
    first[0].data_received(request("brief", outputs=[{"name": "sum", "parameters": {"binary_data": True}}]))
    second[0].data_received(request("other", outputs=[{"name": "negative", "parameters": {"binary_data": True}}]))
    for (_, transport), name, sign in ((first, "brief", 2), (second, "other", -1)):
        ((_, headers, body),) = await answers(transport, 1)
        assert json.loads(body[: int(headers["inference-header-content-length"])])["model_name"] == name
        np.testing.assert_array_equal(np.frombuffer(body[-12:], np.float32), sign * ROW[0])


async def test_an_id_that_the_client_chose_comes_back(service: Service) -> None:
    _, headers, _ = await service.ask(request(headers="x-request-id: mine.1\r\n"))
    assert headers["x-request-id"] == "mine.1"
    _, headers, _ = await service.ask(request(headers="x-request-id: a b\r\n"))
    assert re.fullmatch("[0-9a-f]{16}", headers["x-request-id"])


async def test_requests_behind_each_other_are_answered_in_order(service: Service) -> None:
    _, transport = connection = service.connect()
    connection[0].data_received(b"".join(request(id=str(number)) for number in range(5)))
    found = await answers(transport, 5)
    ids = [json.loads(body[: int(headers["inference-header-content-length"])])["id"] for _, headers, body in found]
    assert ids == list("01234")


async def test_a_connection_is_closed_where_the_client_wants_it(service: Service) -> None:
    connection, transport = service.connect()
    connection.data_received(request(headers="connection: close\r\n"))
    ((status, headers, _),) = await answers(transport, 1)
    assert (status, headers["connection"]) == (200, "close")
    assert transport.is_closed


LEFT_TO_THE_APP = {
    "json_answer": (request(parameters={}), 200),
    "parameters": (request(parameters={"binary_data_output": True, "deterministic": True}), 200),
    "own_page": (request(headers="origin: http://x\r\n"), 200),
    "foreign_page": (request(headers="origin: http://elsewhere\r\n"), 403),
    "compressed_request": (request(coding="gzip"), 200),
    "compressed_answer": (request(headers="accept-encoding: gzip\r\n"), 200),
    "large": (request(row=np.ones((2000, 3), np.float32)), 200),
    "no_rows": (request(row=np.ones((0, 3), np.float32)), 200),
    "unknown_model": (request("unknown"), 404),
    "unknown_version": (request(path="/v2/models/brief/versions/9/infer"), 404),
    "unknown_output": (request(outputs=[{"name": "z", "parameters": {"binary_data": True}}]), 400),
    "wrong_shape": (request(row=np.ones((1, 4), np.float32)), 400),
    "broken_json": (request(inputs=[3]), 400),
    "other_route": (request(path="/v1/infer"), 404),
}


@pytest.mark.parametrize(("message", "status"), LEFT_TO_THE_APP.values(), ids=LEFT_TO_THE_APP.keys())
async def test_what_is_not_plain_is_left_to_the_app(service: Service, message: bytes, status: int) -> None:
    before = service.passed
    assert (await service.ask(message))[0] == status
    assert service.passed == before + 1


async def test_a_body_in_pieces_is_left_to_the_app(service: Service) -> None:
    before, message = service.passed, request()
    assert (await service.ask(message[:-20], message[-20:]))[0] == 200
    assert service.passed == before + 1


async def test_a_connection_that_ended_is_let_go_at_once(service: Service) -> None:
    gc.disable()
    try:
        connection, transport = service.connect()
        connection.data_received(request())
        assert (await answers(transport, 1))[0][0] == 200
        connection.connection_lost(None)
        ended = weakref.ref(connection)
        del connection, transport
        assert ended() is None
    finally:
        gc.enable()


async def test_a_body_that_stops_behind_another_request_is_refused(service: Service) -> None:
    connection, transport = service.connect()
    connection.data_received(request() + request()[:-20])
    assert [status for status, _, _ in await answers(transport, 2)] == [200, 408]
    connection.connection_lost(None)


async def test_a_request_whose_client_left_is_not_answered(service: Service) -> None:
    before = await _counts(service, "brief")
    connection, transport = service.connect()
    connection.data_received(request())
    transport.close()
    connection.connection_lost(None)
    await asyncio.sleep(0.05)
    assert transport.written == b""
    assert await _counts(service, "brief") == before


async def test_bodies_over_the_receive_budget_are_refused(service: Service) -> None:
    budget = service.state["services"].budget
    with budget.held(budget.limit_bytes - 50):
        assert (await service.ask(request()))[0] == 429


async def test_requests_that_are_logged_go_through_the_app(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    before = service.passed
    with caplog.at_level(logging.DEBUG, "service.access"):
        await service.ask(request())
    assert service.passed == before + 1
    assert [record.message for record in caplog.records if record.name == "service.access"] == ["request"]


async def test_a_service_with_allowed_hosts_checks_every_request(tmp_path: Path) -> None:
    async with running(small_settings(tmp_path, allowed_hosts=("x",))) as guarded:
        before = guarded.passed
        assert (await guarded.ask(request()))[0] == 200
        assert (await guarded.ask(request().replace(b"host: x", b"host: y")))[0] == 403
        assert guarded.passed == before + 2
