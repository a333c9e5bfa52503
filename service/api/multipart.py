"""The field `file` of a multipart upload, streamed: nothing is spooled in memory or in a temporary folder."""

from collections import deque
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import PayloadMalformedError

_MAX_HEADER_BYTES = 8192
_MAX_BOUNDARY_BYTES = 70  # RFC 2046, section 5.1.1


class FileField:
    """Feeds a multipart body to a parser and hands out the bytes of the part named `file`."""

    def __init__(self, content_type: str) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if not boundary or len(boundary) > _MAX_BOUNDARY_BYTES:
            raise PayloadMalformedError(
                f"Content-Type: expected multipart/form-data with a boundary of at most {_MAX_BOUNDARY_BYTES} bytes, "
                f"received {len(boundary) if boundary else 'none'}"
            )
        self.filename = ""
        self._has_file = self._is_file = self._is_complete = False
        self._field, self._value = bytearray(), bytearray()
        self._ready: deque[bytes] = deque()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._take_field,
                "on_header_value": self._take_value,
                "on_header_end": self._end_header,
                "on_part_data": self._take_data,
                "on_end": self._complete,
            },
        )

    async def content(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The file's bytes. Raises PayloadMalformedError when the body is no multipart or has no such field."""
        try:
            async for chunk in chunks:
                self._parser.write(chunk)
                while self._ready:
                    yield self._ready.popleft()
            self._parser.finalize()
        except FormParserError as error:
            raise PayloadMalformedError(f"body: expected multipart/form-data, received {error}") from error
        if self._has_file and not self._is_complete:
            raise PayloadMalformedError("body: expected a multipart body that ends with its boundary, received less")
        if not self._has_file:
            raise PayloadMalformedError("file: expected a multipart field of this name, received none")

    def _begin(self) -> None:
        self._is_file = False

    def _take_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._field, data[start:end])

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._value, data[start:end])

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            if options.get(b"name") == b"file":
                if self._has_file:
                    raise PayloadMalformedError("file: expected one multipart field of this name, received several")
                self._is_file = self._has_file = True
                self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        self._field.clear()
        self._value.clear()

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._ready.append(data[start:end])

    def _complete(self) -> None:
        self._is_complete = True

    def _grow(self, buffer: bytearray, data: bytes) -> None:
        buffer += data
        if len(buffer) > _MAX_HEADER_BYTES:
            raise PayloadMalformedError(
                f"body: expected part headers of at most {_MAX_HEADER_BYTES} bytes, received more"
            )
