"""Blobs: content-addressed, bounded, and never half a file."""

import hashlib
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.errors import CheckpointNotFoundError, PayloadTooLargeError, StorageFullError
from service.storage.blobs import Blobs


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[Blobs]:
    opened = Blobs(tmp_path)
    opened.open()
    yield opened
    opened.close()


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


async def test_a_kept_blob_has_its_hash_as_id(blobs: Blobs, tmp_path: Path) -> None:
    parts = (b"a" * 700_000, b"b" * 700_000, b"", b"c")
    staged = await blobs.stage(chunks(*parts), limit_bytes=2_000_000)
    content = b"".join(parts)
    assert (staged.id, staged.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    await blobs.keep(staged)
    assert blobs.path(staged.id).read_bytes() == content
    assert files(tmp_path) == [blobs.path(staged.id)]


async def test_the_same_content_is_one_file(blobs: Blobs, tmp_path: Path) -> None:
    for _ in range(2):
        await blobs.keep(await blobs.stage(chunks(b"same"), limit_bytes=10))
    assert len(files(tmp_path)) == 1


async def test_a_stream_over_the_limit_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(PayloadTooLargeError, match="at most 5 bytes"):
        await blobs.stage(chunks(b"123", b"456"), limit_bytes=5)
    assert files(tmp_path) == []


async def test_a_broken_stream_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 2_000_000
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await blobs.stage(broken(), limit_bytes=10**7)
    assert files(tmp_path) == []


async def test_opening_drops_what_was_half_written(blobs: Blobs, tmp_path: Path) -> None:
    staged = await blobs.stage(chunks(b"never kept"), limit_bytes=100)
    assert staged.path.exists()
    again = Blobs(tmp_path)
    again.open()
    again.close()
    assert files(tmp_path) == []


@pytest.mark.parametrize("blob_id", ["0" * 64, "", "..", "../../etc/passwd", "A" * 64, "0" * 63 + "/"])
async def test_an_unknown_id_is_no_path(blobs: Blobs, blob_id: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        blobs.path(blob_id)


async def test_a_deleted_blob_is_gone(blobs: Blobs) -> None:
    staged = await blobs.stage(chunks(b"gone"), limit_bytes=100)
    await blobs.keep(staged)
    await blobs.delete(staged.id)
    with pytest.raises(CheckpointNotFoundError):
        blobs.path(staged.id)


async def test_a_file_that_another_process_wrote_is_adopted(blobs: Blobs) -> None:
    path = blobs.stage_path()
    path.write_bytes(b"folded")
    staged = await blobs.adopt(path)
    assert (staged.id, staged.bytes) == (hashlib.sha256(b"folded").hexdigest(), 6)


async def test_what_a_killed_process_left_half_written_goes_with_the_file_it_was_for(
    blobs: Blobs, tmp_path: Path
) -> None:
    """Normcore writes to a sibling of the target first; a child may be killed between that and its renaming."""
    path, other = blobs.stage_path(), blobs.stage_path()
    for leftover in (path, path.with_name(f"{path.name}.123.part"), other):
        leftover.write_bytes(b"half")
    await blobs.discard(path)
    assert files(tmp_path) == [other]


async def test_a_full_disk_is_named_for_scratch_files_too(blobs: Blobs) -> None:
    with _largest_file(100_000), pytest.raises(StorageFullError, match="no room"):
        await blobs.write_scratch(blobs.stage_path(), [memoryview(bytes(300_000))])


@contextmanager
def _largest_file(size_bytes: int) -> Iterator[None]:
    """The nearest to a full disk that needs no privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size_bytes", [300_000, 3_000_000], ids=["buffered", "streamed"])
async def test_a_full_disk_leaves_nothing_behind(blobs: Blobs, tmp_path: Path, size_bytes: int) -> None:
    with _largest_file(100_000), pytest.raises(StorageFullError, match="no room"):
        await blobs.stage(chunks(bytes(size_bytes)), limit_bytes=10**7)
    assert not files(tmp_path)
    await blobs.keep(await blobs.stage(chunks(bytes(size_bytes)), limit_bytes=10**7))
