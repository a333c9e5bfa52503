"""The parser of a connection's requests, for those too that offer to upgrade it, as Java's client does by default."""

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = frozenset((b"upgrade", b"http2-settings"))


class Parser:
    """Reads a request whose offer is not taken as if it had none: httptools would end it with its head.

    https://github.com/Kludex/uvicorn/issues/2722
    """

    def __init__(self, connection: HttpToolsProtocol) -> None:
        self._connection = connection
        self._parser = _begun(connection)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    @property
    def declines(self) -> bool:
        """Whether the head that has been read comes once more, without its offer."""
        parser = self._parser
        return parser.should_upgrade() and parser.get_method() != b"CONNECT" and not self._connection._should_upgrade()

    def feed_data(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self.declines:
                    raise
                data = data[upgrade.args[0] :]
                head = self._head()
                self._parser = _begun(self._connection)
                self._parser.feed_data(head)
            else:
                return

    def _head(self) -> bytes:
        """What was read, without the offer."""
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self._parser.get_method(), self._connection.url, version)]
        for name, value in self._connection.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in _OFFER)
            if name not in _OFFER:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])


def _begun(connection: HttpToolsProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(connection)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
    return parser
