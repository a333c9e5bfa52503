"""SHA-256 of what streams by, on another thread: it is half the work of a fold, and needs no interpreter."""

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALL_BYTES = 1 << 15  # hashed at once: handing a block over costs more
_BACKLOG = 8  # blocks that may wait to be hashed: what bounds the memory


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The elements in row-major order, without a copy where they already lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class Hashing:
    """Two digests of one stream of blocks: as they were, and as they are written."""

    def __init__(self) -> None:
        self._before = hashlib.sha256()
        self._after = hashlib.sha256()
        self._pending: deque[Future[None]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Hashing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def update(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        """Take note of a block; neither array may change afterwards."""
        if self._pool is None and before.nbytes <= _SMALL_BYTES:
            self._digest(before, after)
            return
        self._pool = self._pool or ThreadPoolExecutor(max_workers=1)
        self._pending.append(self._pool.submit(self._digest, before, after))
        if len(self._pending) > _BACKLOG:
            self._pending.popleft().result()

    def finish(self) -> tuple[str, str]:
        """Both digests, in hexadecimal."""
        while self._pending:
            self._pending.popleft().result()
        return self._before.hexdigest(), self._after.hexdigest()

    def _digest(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        self._before.update(bytes_of(before))
        self._after.update(bytes_of(after))


__all__ = ["Hashing", "bytes_of"]
