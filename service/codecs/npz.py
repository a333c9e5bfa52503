"""`application/x-npz`: tensors by name, as `numpy.load` and `numpy.savez` know them.

Only stored zip entries: a compressed one could grow to any size. The arrays are views on the body, so the directory
is read here and not by `zipfile`, which copies.
"""

import struct
import zlib
from collections.abc import Collection, Iterator, Mapping

from service.codecs import npy
from service.codecs.body import EncodedBody, TensorBody, from_query
from service.codecs.buffers import Buffer
from service.codecs.npy import diagnostics_header
from service.engine.protocol import Tensor, Tensors
from service.errors import NotAcceptableError, PayloadMalformedError, PayloadTooLargeError

MEDIA_TYPE = "application/x-npz"
ONLY_OUTPUT: str | None = None
MAX_ENTRIES = 1024
_SUFFIX = ".npy"
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_ZIP64 = 0xFFFFFFFF
_ENCRYPTED = 0x1
_UTF8_NAME = 0x800
_NEED_VERSION = 20
_DOS_DATE = 0x21  # 1980-01-01, so that equal outputs are equal bytes


def decode(body: Buffer, /, *, tensor_names: Collection[str], query_parameters: Mapping[str, str]) -> TensorBody:
    """Decode every entry as the tensor of its name; parameters come from the query string."""
    tensors: dict[str, Tensor] = {}
    for name, data in _entries(memoryview(body)):
        if name in tensors:
            raise PayloadMalformedError(f"entry {name[:60]!r}: expected once, received twice")
        tensors[name] = npy.read(data, field=f"entry {name[:60]!r}")
    return from_query(tensors, tensor_names=tensor_names, query_parameters=query_parameters)


def encode(method: str, outputs: Tensors, diagnostics: Mapping[str, object]) -> EncodedBody:
    """Encode a stored entry per output; the diagnostics become a header."""
    chunks: list[bytes | memoryview] = []
    directory: list[bytes] = []
    offset = 0
    for name, array in outputs.items():
        file_name = f"{name}{_SUFFIX}".encode()
        data = npy.write(array)
        size = sum(map(len, data))
        if offset + size >= _ZIP64:
            raise NotAcceptableError(f"{MEDIA_TYPE}: holds up to 4 GiB; accept application/vnd.safetensors")
        crc = 0
        for chunk in data:
            crc = zlib.crc32(chunk, crc)
        common = (_NEED_VERSION, _UTF8_NAME, 0, 0, _DOS_DATE, crc, size, size, len(file_name), 0)
        directory.append(_CENTRAL.pack(_CENTRAL_MAGIC, _NEED_VERSION, *common, 0, 0, 0, 0, offset) + file_name)
        chunks += (_LOCAL.pack(_LOCAL_MAGIC, *common) + file_name, *data)
        offset += _LOCAL.size + len(file_name) + size
    listing = b"".join(directory)
    count = len(directory)
    chunks.append(listing + _END.pack(_END_MAGIC, 0, 0, count, count, len(listing), offset, 0))
    return EncodedBody(chunks, MEDIA_TYPE, headers=diagnostics_header(diagnostics))


def _entries(body: memoryview) -> Iterator[tuple[str, memoryview]]:
    position, count = _directory(body)
    for _ in range(count):
        if position + _CENTRAL.size > len(body):
            raise PayloadMalformedError(f"zip directory: expected {count} entries, the body ends before")
        fields = _CENTRAL.unpack_from(body, position)
        magic, _, _, flags, method, _, _, crc, stored_size, size, name_length, *rest = fields
        if magic != _CENTRAL_MAGIC:
            raise PayloadMalformedError(f"zip directory: expected {_CENTRAL_MAGIC!r}, received {magic!r}")
        start = position + _CENTRAL.size
        name = _name(bytes(body[start : start + name_length]))
        place = f"entry {name[:60]!r}"
        _check_entry(place, flags, method, stored_size, size)
        data = _data(body, offset=rest[-1], size=size, place=place)
        if zlib.crc32(data) != crc:
            raise PayloadMalformedError(f"{place}: expected the CRC-32 {crc:08x}, received {zlib.crc32(data):08x}")
        yield name, data
        position = start + name_length + rest[0] + rest[1]


def _directory(body: memoryview) -> tuple[int, int]:
    tail = bytes(body[-(_END.size + 0xFFFF) :])
    found = tail.rfind(_END_MAGIC, 0, len(tail) - _END.size + len(_END_MAGIC))
    if found < 0:
        raise PayloadMalformedError(f"body: expected a .npz file (zip), received {len(body)} bytes without a directory")
    _, disk, start_disk, on_disk, count, _, offset, _ = _END.unpack_from(tail, found)
    if disk or start_disk or on_disk != count or offset == _ZIP64:
        raise PayloadMalformedError("body: expected a zip file in one part and under 4 GiB")
    if count > MAX_ENTRIES:
        raise PayloadTooLargeError(f"body: expected at most {MAX_ENTRIES} entries, received {count}")
    return offset, count


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise PayloadMalformedError(f"zip directory: expected names in UTF-8, received {raw[:40]!r}") from None
    if not name.endswith(_SUFFIX):
        raise PayloadMalformedError(f"entry {name[:60]!r}: expected a name that ends with {_SUFFIX}")
    return name.removesuffix(_SUFFIX)


def _check_entry(place: str, flags: int, method: int, stored_size: int, size: int) -> None:
    if flags & _ENCRYPTED:
        raise PayloadMalformedError(f"{place}: expected no encryption")
    if method != 0:
        raise PayloadMalformedError(
            f"{place}: expected a stored entry, received compression method {method}; "
            f"write with numpy.savez, not savez_compressed"
        )
    if stored_size != size or size == _ZIP64:
        raise PayloadMalformedError(f"{place}: expected one size under 4 GiB, received {stored_size} and {size}")


def _data(body: memoryview, *, offset: int, size: int, place: str) -> memoryview:
    if offset + _LOCAL.size > len(body) or bytes(body[offset : offset + 4]) != _LOCAL_MAGIC:
        raise PayloadMalformedError(f"{place}: expected its local header at byte {offset}")
    *_, name_length, extra_length = _LOCAL.unpack_from(body, offset)
    # the extra field of the local header differs from the directory's: numpy pads only the former
    start = offset + _LOCAL.size + name_length + extra_length
    if start + size > len(body):
        raise PayloadMalformedError(f"{place}: expected {size} bytes, received {max(len(body) - start, 0)}")
    return body[start : start + size]
