"""Connections with bounds that uvicorn leaves open: the head of a request, and a client that does not read."""

import asyncio
import socket
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.asgi import IS_WHOLE, leave
from service.api.errors import envelope
from service.api.parser import Parser

if TYPE_CHECKING:
    from starlette.types import Scope

_HEAD_BYTES = 64 * 1024


class Connection(HttpToolsProtocol):
    """Ends when a head is too long or too slow, or when the peer takes nothing of an answer."""

    timeout_s = 30.0
    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_head = True
    _held: "_Exchange | None" = None

    @classmethod
    def within(cls, timeout_s: float) -> type["Connection"]:
        """The class of connections with this bound; uvicorn makes them with no argument for it."""
        return type(cls.__name__, (cls,), {"timeout_s": timeout_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base
        super().connection_made(transport)
        self._parser = self.parser = Parser(self)  # type: ignore[assignment]  # it has all that its base asks of one
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; it also ends a connection whose peer's window stays closed
            connection: socket.socket = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.timeout_s * 1000))
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        if self.cycle is not None and not self.cycle.response_complete:
            leave(self.cycle.scope)
        super().connection_lost(exc)
        del self._parser  # which holds the connection

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._held is not None:
            held, self._held = self._held, None
            if held.is_whole:
                self.app_state["shortcut"].offer(held)
            else:
                held.pass_on()
        if not self._is_in_head:
            return
        if self._head_bytes > _HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the head of a request is over {_HEAD_BYTES} bytes")
        self._time_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._end_head()
        self._is_in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        if self._parser.declines:
            return
        self._end_head()
        super().on_headers_complete()
        self._is_in_head = False

    def on_message_complete(self) -> None:
        if self._parser.declines:
            return
        super().on_message_complete()
        self.scope[IS_WHOLE] = True  # type: ignore[literal-required]  # a key of our own

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        shortcut = self.app_state.get("shortcut")
        is_fresh = self._is_in_head and cycle.more_body  # else it has waited for answers to those before it
        if is_fresh and cycle.keep_alive and shortcut is not None and shortcut.takes(cycle.scope):
            self._held = _Exchange(self, cycle, app)  # until what has come of it is read: `data_received` lets go
        else:
            super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """In the form of every other error answer."""
        answer = envelope(HTTPStatus.BAD_REQUEST, "payload_malformed", msg)
        head = [b"HTTP/1.1 400 Bad Request"]
        head += [name + b": " + value for name, value in (*answer.raw_headers, (b"connection", b"close"))]
        self.transport.write(b"\r\n".join([*head, b"", bytes(answer.body)]))
        self.transport.close()

    def _time_head(self) -> None:
        """From its first bytes that came without its end: most heads come whole, and need no timer."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.timeout_s, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # a pipelined head may wait for earlier answers
            self.transport.close()

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Exchange:
    """A request whose app has not started; see the shortcut that it is offered to."""

    __slots__ = ("_app", "_connection", "_cycle", "scope")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._connection = connection
        self._cycle = cycle
        self._app = app
        self.scope: Scope = cycle.scope  # type: ignore[assignment]  # uvicorn's own type of the same

    @property
    def body(self) -> bytearray:
        return self._cycle.body

    @property
    def is_whole(self) -> bool:
        return not self._cycle.more_body

    @property
    def can_answer(self) -> bool:
        cycle = self._cycle
        return not (cycle.disconnected or cycle.flow.write_paused or cycle.transport.is_closing())

    def pass_on(self) -> None:
        HttpToolsProtocol._start_asgi_task(self._connection, self._cycle, self._app)

    def answer(self, headers: Sequence[tuple[bytes, bytes]], chunks: Sequence[bytes | memoryview]) -> None:
        """In one write; the app's two messages would be checked and written one by one."""
        cycle, connection = self._cycle, self._connection
        lines = [b"HTTP/1.1 200 OK"]
        lines += [name + b": " + value for name, value in (*connection.server_state.default_headers, *headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close")
        connection.transport.write(b"".join([b"\r\n".join([*lines, b"", b""]), *chunks]))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            connection.transport.close()
        on_response, cycle.on_response = cycle.on_response, _nothing  # which holds the connection that holds the cycle
        on_response()


def _nothing() -> None: ...
