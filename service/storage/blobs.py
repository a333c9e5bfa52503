"""Content-addressed files: a blob's id is the SHA-256 of its bytes, and no client's text becomes a path."""

import asyncio
import errno
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from service.errors import CheckpointNotFoundError, PayloadTooLargeError, StorageFullError

T = TypeVar("T")
_WRITE_BYTES = 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """A file that is complete but not yet kept."""

    id: str
    bytes: int
    path: Path


class Blobs:
    """Files under `root`; written beside, flushed to the disk, then renamed into place."""

    def __init__(self, root: Path) -> None:
        self._root = root / "blobs"
        self._staging = root / "staging"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blobs")

    def open(self) -> None:
        """Make the folders and drop what an earlier process left half written."""
        self._root.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(parents=True, exist_ok=True)
        for leftover in self._staging.iterdir():
            leftover.unlink()

    def close(self) -> None:
        self._thread.shutdown()

    def stage_path(self) -> Path:
        """A fresh path for a file that another process writes."""
        return self._staging / secrets.token_hex(16)

    async def stage(self, chunks: AsyncIterator[bytes], *, limit_bytes: int) -> StagedBlob:
        """Write a stream to a staged file, at most `limit_bytes` of it."""
        path = self.stage_path()
        digest = hashlib.sha256()
        size = 0
        pending = bytearray()
        with _disk_errors():
            file = await self._run(lambda: path.open("xb"))
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > limit_bytes:
                        raise PayloadTooLargeError(
                            "body: expected at most "
                            f"{limit_bytes} bytes (NORMSERVE_MAX_CHECKPOINT_BYTES), received more",
                            limit_bytes=limit_bytes,
                        )
                    pending += chunk
                    if len(pending) >= _WRITE_BYTES:
                        full, pending = pending, bytearray()
                        await self._run(partial(_append, file, digest, full))
                await self._run(lambda: _finish(file, digest, pending))
            except BaseException:
                await asyncio.shield(self._run(lambda: _drop(file, path)))
                raise
        return StagedBlob(id=digest.hexdigest(), bytes=size, path=path)

    async def adopt(self, path: Path) -> StagedBlob:
        """Hash and flush a file that another process wrote to a staged path."""
        with _disk_errors():
            return await self._run(lambda: _adopt(path))

    async def write_scratch(self, path: Path, chunks: Sequence[memoryview]) -> None:
        """Write a file that another process reads and nobody keeps, so it need not reach the disk."""
        with _disk_errors():
            await self._run(lambda: _write(path, chunks))

    async def keep(self, staged: StagedBlob) -> None:
        """Rename a staged file into place; the same content kept twice is one file."""
        with _disk_errors():
            await self._run(lambda: _keep(staged.path, self._path(staged.id)))

    async def discard(self, path: Path) -> None:
        """Drop a staged file, and what a process left of it that was killed while it wrote."""
        await self._run(lambda: _discard(path))

    async def delete(self, blob_id: str) -> None:
        await self._run(lambda: self._path(blob_id).unlink(missing_ok=True))

    def path(self, blob_id: str) -> Path:
        """Where a kept blob lies. Raises CheckpointNotFoundError."""
        path = self._path(blob_id) if _ID.fullmatch(blob_id) else None
        if path is None or not path.is_file():
            raise CheckpointNotFoundError(f"checkpoint: no checkpoint with the id {blob_id[:80]!r}")
        return path

    def _path(self, blob_id: str) -> Path:
        return self._root / blob_id[:2] / blob_id

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError("storage: the data directory has no room for this file") from error
        raise


def _append(file: BinaryIO, digest: "hashlib._Hash", data: bytearray) -> None:
    digest.update(data)
    file.write(data)


def _finish(file: BinaryIO, digest: "hashlib._Hash", data: bytearray) -> None:
    _append(file, digest, data)
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _discard(path: Path) -> None:
    for leftover in (path, *path.parent.glob(f"{path.name}.*.part")):
        leftover.unlink(missing_ok=True)


def _drop(file: BinaryIO, path: Path) -> None:
    with suppress(OSError):  # closing writes what is buffered, and the disk may be full
        file.close()
    path.unlink(missing_ok=True)


def _write(path: Path, chunks: Sequence[memoryview]) -> None:
    with path.open("xb") as file:
        file.writelines(chunks)


def _adopt(path: Path) -> StagedBlob:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
        return StagedBlob(id=digest.hexdigest(), bytes=file.tell(), path=path)


def _keep(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    source.replace(target)
    for folder in (target.parent, target.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
