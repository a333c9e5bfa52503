"""Connections with bounds that uvicorn leaves open: the head of a request, and a client that does not read."""

import asyncio
import socket
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.asgi import IS_WHOLE, leave
from service.api.errors import envelope

_HEAD_BYTES = 64 * 1024


class Connection(HttpToolsProtocol):
    """Ends when a head is too long or too slow, or when the peer takes nothing of an answer."""

    timeout_s = 30.0
    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_head = True

    @classmethod
    def within(cls, timeout_s: float) -> type["Connection"]:
        """The class of connections with this bound; uvicorn makes them with no argument for it."""
        return type(cls.__name__, (cls,), {"timeout_s": timeout_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; it also ends a connection whose peer's window stays closed
            connection: socket.socket = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.timeout_s * 1000))
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        if self.cycle is not None and not self.cycle.response_complete:
            leave(self.cycle.scope)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
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
        self._end_head()
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.scope[IS_WHOLE] = True  # type: ignore[literal-required]  # a key of our own

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
