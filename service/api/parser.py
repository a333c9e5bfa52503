"""The parser of a connection's requests, for those too that offer to upgrade it, as Java's client does by default."""

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = frozenset((b"upgrade", b"http2-settings"))


class Parser:
    """Reads a request whose offer is not taken as if it had none: httptools would end it with its head.

    https://github.com/Kludex/uvicorn/issues/2722
    """

    def __init__(self, connection: HttpToolsProtocol) -> None:
        self._connection = connection
        self._begin()

    def _begin(self) -> None:
        parser = httptools.HttpRequestParser(self._connection)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._feed = parser.feed_data
        # What uvicorn asks, several times in each request: each costs no more than it would there.
        self.get_http_version = parser.get_http_version
        self.get_method = parser.get_method
        self.should_keep_alive = parser.should_keep_alive
        self.should_upgrade = parser.should_upgrade

    @property
    def declines(self) -> bool:
        """Whether the head that has been read comes once more, without its offer."""
        return self.should_upgrade() and self.get_method() != b"CONNECT" and not self._connection._should_upgrade()

    def feed_data(self, data: bytes) -> None:
        while data:
            try:
                self._feed(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self.declines:
                    raise
                data = data[upgrade.args[0] :]
                head = self._head()
                self._begin()
                self._feed(head)
            else:
                return

    def _head(self) -> bytes:
        """What was read, without the offer."""
        version = self.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.get_method(), self._connection.url, version)]
        for name, value in self._connection.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in _OFFER)
            if name not in _OFFER:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])
