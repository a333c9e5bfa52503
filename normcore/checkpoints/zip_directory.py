"""The table of contents of a zip archive whose entries are stored, not compressed; nothing is unpacked."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from normcore.checkpoints.tensors import quote
from normcore.errors import CheckpointError

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_ZIP64_EXTRA = 1
_FULL = 0xFFFFFFFF
_FULL_SHORT = 0xFFFF
_ENTRY_OVERHEAD_BYTES = 512  # name, extra and comment together, on average


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry: where its bytes lie in the archive."""

    name: str
    offset: int
    size: int


def read_directory(file: BinaryIO, *, max_entries: int) -> dict[str, ZipEntry]:
    """Entries by name, in the archive's order.

    Raises:
        CheckpointError: the directory is damaged or too large; an entry is compressed, encrypted, named twice, named
            to leave its folder, or overlaps another.
    """
    size = file.seek(0, 2)
    start, length, entries = _find_directory(file, size)
    if entries > max_entries or length > max_entries * _ENTRY_OVERHEAD_BYTES:
        raise CheckpointError(f"the archive lists {entries} entries in {length} bytes, more than {max_entries} allowed")
    file.seek(start)
    content = file.read(length)
    found: dict[str, ZipEntry] = {}
    ranges = []
    for name, header, stored in _entries(content, entries):
        if name in found:
            raise CheckpointError(f"the archive names the entry {quote(name)} twice")
        entry = _locate(file, name, header, stored, end=start)
        found[name] = entry
        ranges.append((header, entry.offset + entry.size, name))
    end = 0
    for begin, stop, name in sorted(ranges):
        if begin < end:
            raise CheckpointError(f"entry {quote(name)} of the archive overlaps another")
        end = stop
    return found


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start, length and number of entries, from the record at the very end of the file."""
    if size < _END.size:
        raise CheckpointError("the zip archive is truncated")
    file.seek(size - _END.size)
    magic, disk, first_disk, here, entries, length, start, comment = _END.unpack(file.read(_END.size))
    if magic != b"PK\x05\x06" or comment:
        raise CheckpointError("the zip archive is truncated, or bytes follow its directory")
    if disk or first_disk or here != entries:
        raise CheckpointError("the zip archive is split into several files")
    end = size - _END.size
    if _FULL in (length, start) or entries == _FULL_SHORT:
        start, length, entries, end = _find_directory64(file, end)
    if start + length > end:
        raise CheckpointError("the directory of the zip archive lies outside the file")
    return start, length, entries


def _find_directory64(file: BinaryIO, end: int) -> tuple[int, int, int, int]:
    if end < _LOCATOR64.size + _END64.size:
        raise CheckpointError("the zip archive is truncated")
    file.seek(end - _LOCATOR64.size)
    magic, _, record, _ = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
    if magic != b"PK\x06\x07" or record > end - _LOCATOR64.size - _END64.size:
        raise CheckpointError("the zip archive has no valid zip64 directory")
    file.seek(record)
    magic, _, _, _, _, _, here, entries, length, start = _END64.unpack(file.read(_END64.size))
    if magic != b"PK\x06\x06" or here != entries:
        raise CheckpointError("the zip archive has no valid zip64 directory")
    return start, length, entries, record


def _entries(content: bytes, entries: int) -> Iterator[tuple[str, int, int]]:
    """Name, position of the local header and size of each entry."""
    position = 0
    for _ in range(entries):
        if position + _ENTRY.size > len(content):
            raise CheckpointError("the directory of the zip archive is truncated")
        fields = _ENTRY.unpack_from(content, position)
        magic, flags, method = fields[0], fields[3], fields[4]
        packed, size, name_length, extra_length, comment_length = fields[8:13]
        header = fields[16]
        if magic != b"PK\x01\x02":
            raise CheckpointError("the directory of the zip archive is damaged")
        position += _ENTRY.size
        name = _name(content[position : position + name_length])
        extra = content[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        size, packed, header = _wide(extra, (size, packed, header), name)
        _check_stored(name, flags, method, size, packed)
        yield name, header, size
    if position != len(content):
        raise CheckpointError("the directory of the zip archive has another length than it says")


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise CheckpointError("the archive has an entry whose name is not UTF-8") from None
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\")) or ".." in parts or "\0" in name or ":" in parts[0]:
        raise CheckpointError(f"the archive has an entry named {quote(name)}, which leaves its folder")
    return name


def _wide(extra: bytes, values: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    """Size, packed size and position, where needed from the 64-bit extra field that lists those which are full."""
    if _FULL not in values:
        return values
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == _ZIP64_EXTRA:
            field = extra[position : position + length]
            numbers = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            size, packed, header = (next(numbers, _FULL) if value == _FULL else value for value in values)
            return size, packed, header
        position += length
    raise CheckpointError(f"entry {quote(name)} of the archive lacks its 64-bit sizes")


def _check_stored(name: str, flags: int, method: int, size: int, packed: int) -> None:
    if flags & _ENCRYPTED:
        raise CheckpointError(f"entry {quote(name)} of the archive is encrypted")
    if method or size != packed:
        raise CheckpointError(
            f"entry {quote(name)} of the archive is compressed, which torch.save never does (TorchScript archives, "
            "which hold a program, are); save the tensors alone: torch.save(model.state_dict(), path)"
        )


def _locate(file: BinaryIO, name: str, header: int, size: int, *, end: int) -> ZipEntry:
    if header + _LOCAL.size > end:
        raise CheckpointError(f"entry {quote(name)} lies outside the archive")
    file.seek(header)
    fields = _LOCAL.unpack(file.read(_LOCAL.size))
    name_length, extra_length = fields[9:]
    if fields[0] != b"PK\x03\x04" or file.read(name_length) != name.encode():
        raise CheckpointError(f"entry {quote(name)} of the archive contradicts the directory")
    offset = header + _LOCAL.size + name_length + extra_length
    if offset + size > end:
        raise CheckpointError(f"entry {quote(name)} lies outside the archive")
    return ZipEntry(name, offset, size)


__all__ = ["ZipEntry", "read_directory"]
