"""`application/x-npy`: the tensor `input` in, the tensor `output` out, as `numpy.load` and `numpy.save` know it.

numpy has no bfloat16: it saves one as two opaque bytes, `V2`. So `V2` is BF16 here, in both directions, and a reader
calls `.view(ml_dtypes.bfloat16)`. Objects and pickles are not read.
"""

import json
import re
from collections.abc import Collection, Mapping

import numpy as np

from service import datatypes
from service.codecs.body import EncodedBody, TensorBody, from_query
from service.codecs.buffers import Buffer, check_shape, check_size, to_bytes, view
from service.codecs.json_text import printable
from service.codecs.layout import TensorLayout
from service.datatypes import BYTES, DATATYPES, Datatype
from service.engine.protocol import Tensor, Tensors
from service.errors import NotAcceptableError, PayloadMalformedError, PayloadTooLargeError

MEDIA_TYPE = "application/x-npy"
ONLY_OUTPUT: str | None = "output"
DIAGNOSTICS_HEADER = "Normserve-Diagnostics"
_MAGIC = b"\x93NUMPY"
_VERSIONS = (b"\x01\x00", b"\x02\x00", b"\x03\x00")
_MAX_HEADER_BYTES = 10_000  # numpy's own limit
_ALIGNMENT = 64
_QUOTED = r"(?:'([^'\"]*)'|\"([^'\"]*)\")"
_INTEGERS = r"\(((?:\s*[0-9]{1,18}\s*,)*(?:\s*[0-9]{1,18})?)\s*\)"
_DESCR, _FORTRAN_ORDER, _SHAPE = (
    re.compile(rf"""['"]{key}['"]\s*:\s*{value}""")
    for key, value in (("descr", _QUOTED), ("fortran_order", "(True|False)"), ("shape", _INTEGERS))
)
_EMPTIED = re.compile(r"\{,{2,3}\}")
_DESCR_CODES = {datatype.numpy.str[1:]: datatype for datatype in DATATYPES if datatype is not BYTES}


def decode(body: Buffer, /, *, tensor_names: Collection[str], query_parameters: Mapping[str, str]) -> TensorBody:
    """Decode the tensor `input`; parameters come from the query string."""
    tensors = {"input": read(body, field="body")}
    return from_query(tensors, tensor_names=tensor_names, query_parameters=query_parameters)


def encode(method: str, outputs: Tensors, diagnostics: Mapping[str, object]) -> EncodedBody:
    """Encode the tensor `output`, which has to be the only one; the diagnostics become a header."""
    if list(outputs) != [ONLY_OUTPUT]:
        raise NotAcceptableError(
            f"{MEDIA_TYPE}: holds the one tensor output, received {', '.join(outputs) or 'none'}; "
            f"select outputs=output or accept application/x-npz"
        )
    return EncodedBody(write(outputs["output"]), MEDIA_TYPE, headers=diagnostics_header(diagnostics))


def diagnostics_header(diagnostics: Mapping[str, object]) -> dict[str, str]:
    """Return the header that carries diagnostics where a body has no room for them."""
    if not diagnostics:
        return {}
    # json, unlike orjson, escapes what is not ASCII
    return {DIAGNOSTICS_HEADER: json.dumps(printable(diagnostics, are_tokens_bare=False), separators=(",", ":"))}


def read(data: Buffer, *, field: str) -> Tensor:
    """Return the array of a file of format 1, 2 or 3; a view where it is in C order and native byte order."""
    found = layout(data, field=field)
    if found is None:
        raise PayloadMalformedError(f"{field}: expected a .npy file with a whole header, received {len(data)} bytes")
    check_size(len(data) - found.offset, found.datatype, found.shape, field=field)
    array = _view(data, found, field=field)
    return array.T.copy() if found.is_transposed else array


def layout(head: Buffer, *, field: str) -> TensorLayout | None:
    """Return where the data of a file lies, from its first bytes; None while the header is not all there."""
    parsed = _header(head, field)
    if parsed is None:
        return None
    header, offset = parsed
    parts = [pattern.findall(header) for pattern in (_DESCR, _FORTRAN_ORDER, _SHAPE)]
    for pattern in (_DESCR, _FORTRAN_ORDER, _SHAPE):
        header = pattern.sub("", header)
    if any(len(found) != 1 for found in parts) or not _EMPTIED.fullmatch("".join(header.split())):
        raise PayloadMalformedError(
            f"{field}: expected a .npy header with one plain descr, fortran_order and shape; "
            f"structured types are not read"
        )
    (descr,), (fortran_order,), (sizes,) = parts
    order, datatype = _datatype("".join(descr), field)
    shape = check_shape([int(size) for size in sizes.split(",") if size.strip()], field=f"{field} shape")
    is_fortran = fortran_order == "True" and len(shape) > 1
    return TensorLayout(
        datatype,
        shape[::-1] if is_fortran else shape,
        offset,
        is_transposed=is_fortran,
        is_swapped=order == ">" and datatype.itemsize > 1,
    )


def write(array: Tensor) -> list[bytes | memoryview]:
    """Return the chunks of a file of format 1."""
    header = f"{{'descr': '{datatypes.of(array).numpy.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    if array.dtype == np.object_:
        raise NotAcceptableError(f"{MEDIA_TYPE}: holds no BYTES tensor")
    prefix_bytes = len(_MAGIC) + 4
    padding = -(prefix_bytes + len(header) + 1) % _ALIGNMENT
    text = f"{header}{' ' * padding}\n".encode("ascii")
    return [_MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text, to_bytes(array)]


def _header(data: Buffer, field: str) -> tuple[str, int] | None:
    start = bytes(data[: len(_MAGIC) + 6])
    version = start[len(_MAGIC) : len(_MAGIC) + 2]
    is_whole = len(version) == 2
    if start[: len(_MAGIC)] != _MAGIC[: len(start)] or (is_whole and version not in _VERSIONS):
        raise PayloadMalformedError(f"{field}: expected a .npy file of format 1, 2 or 3, received {start[:8]!r}")
    offset = len(_MAGIC) + 2 + (2 if version == _VERSIONS[0] else 4)
    if not is_whole or len(start) < offset:
        return None
    length = int.from_bytes(start[len(_MAGIC) + 2 : offset], "little")
    if length > _MAX_HEADER_BYTES:
        raise PayloadTooLargeError(
            f"{field}: expected a .npy header up to {_MAX_HEADER_BYTES} bytes, received {length}"
        )
    if offset + length > len(data):
        return None
    return bytes(data[offset : offset + length]).decode("latin-1"), offset + length


def _datatype(descr: str, field: str) -> tuple[str, Datatype]:
    order, code = (descr[0], descr[1:]) if descr[:1] in tuple("<>|=") else ("=", descr)
    datatype = _DESCR_CODES.get(code)
    if datatype is None:
        raise PayloadMalformedError(
            f"{field}: expected a descr of {', '.join(_DESCR_CODES)} (V2 is BF16), received {descr[:40]!r}; "
            f"objects and pickles are not read"
        )
    return order, datatype


def _view(data: Buffer, found: TensorLayout, *, field: str) -> Tensor:
    if not found.is_swapped:
        return view(data, found.offset, found.datatype, found.shape, field=field)
    swapped = np.frombuffer(data, f">u{found.datatype.itemsize}", offset=found.offset)
    return swapped.astype(f"=u{found.datatype.itemsize}").view(found.datatype.numpy).reshape(found.shape)
