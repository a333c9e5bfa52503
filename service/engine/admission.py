"""Admission: the bytes of request bodies that may be held at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import OverloadedError, PayloadTooLargeError


class ReceiveBudget:
    """Bytes reserved before a body is read. It belongs to one event loop: nothing between check and count awaits."""

    def __init__(self, limit_bytes: int, *, setting: str = "NORMSERVE_RECEIVE_BUDGET_BYTES") -> None:
        self.limit_bytes = limit_bytes
        self._setting = setting
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def reserve(self, size_bytes: int) -> None:
        """Hold `size_bytes` until they are released. Raises OverloadedError while others hold too much."""
        if size_bytes > self.limit_bytes:
            raise PayloadTooLargeError(
                f"a body of {size_bytes} bytes is over the limit of {self.limit_bytes} bytes "
                f"for all bodies together ({self._setting})"
            )
        if self._used_bytes + size_bytes > self.limit_bytes:
            raise OverloadedError(
                f"{self._used_bytes} of {self.limit_bytes} bytes for request bodies are in use, "
                f"{size_bytes} more do not fit ({self._setting}); try again"
            )
        self._used_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes

    @contextmanager
    def held(self, size_bytes: int) -> Iterator[None]:
        """Reserve while the block runs."""
        self.reserve(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)
