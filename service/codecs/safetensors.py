"""`application/vnd.safetensors`: tensors by name behind a JSON header.

Read here and not by the safetensors package, whose `deserialize` copies every tensor.
"""

import json
from collections.abc import Collection, Mapping

import numpy as np
import orjson

from service import datatypes
from service.codecs.body import EncodedBody, TensorBody, from_query
from service.codecs.buffers import Buffer, check_shape, check_size, to_bytes, view
from service.codecs.json_text import describe, expect_object, printable
from service.datatypes import DATATYPES, Datatype
from service.engine.protocol import Tensor, Tensors
from service.errors import NotAcceptableError, PayloadMalformedError, PayloadTooLargeError

MEDIA_TYPE = "application/vnd.safetensors"
ONLY_OUTPUT: str | None = None
MAX_HEADER_BYTES = 16_000_000
_METADATA = "__metadata__"
_PREFIX_BYTES = 8
_BY_NAME = {datatype.safetensors: datatype for datatype in DATATYPES if datatype.safetensors}


def decode(body: Buffer, /, *, tensor_names: Collection[str], query_parameters: Mapping[str, str]) -> TensorBody:
    """Decode every tensor; parameters come from the query string."""
    header, start = _header(body)
    header.pop(_METADATA, None)
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, value in header.items():
        place = f"tensor {name[:60]!r}"
        datatype, shape, begin, end = _entry(value, place)
        check_size(end - begin, datatype, shape, field=place)
        if start + end > len(body):
            raise PayloadMalformedError(f"{place}: expected {end} bytes of data, received {len(body) - start} in all")
        tensors[name] = view(body, start + begin, datatype, shape, field=place)
        ranges.append((begin, end))
    _check_ranges(ranges, len(body) - start)
    return from_query(tensors, tensor_names=tensor_names, query_parameters=query_parameters)


def encode(method: str, outputs: Tensors, diagnostics: Mapping[str, object]) -> EncodedBody:
    """Encode the outputs, the widest elements first so that all are aligned; `__metadata__` has the diagnostics."""
    text = orjson.dumps(printable(diagnostics, are_tokens_bare=False)).decode()
    header: dict[str, object] = {_METADATA: {"method": method, "diagnostics": text}}
    chunks: list[bytes | memoryview] = [b""]
    offset = 0
    for name, array in sorted(outputs.items(), key=lambda item: -item[1].dtype.itemsize):
        if array.dtype == np.object_:
            raise NotAcceptableError(f"{MEDIA_TYPE}: holds no BYTES tensor, received output {name!r}")
        end = offset + array.nbytes
        header[name] = {
            "dtype": datatypes.of(array).safetensors,
            "shape": array.shape,
            "data_offsets": [offset, end],
        }
        chunks.append(to_bytes(array))
        offset = end
    encoded = orjson.dumps(header)
    encoded += b" " * (-len(encoded) % _PREFIX_BYTES)
    chunks[0] = len(encoded).to_bytes(_PREFIX_BYTES, "little") + encoded
    return EncodedBody(chunks, MEDIA_TYPE)


def _header(body: Buffer) -> tuple[dict[str, object], int]:
    if len(body) < _PREFIX_BYTES:
        raise PayloadMalformedError(f"body: expected a safetensors file, received {len(body)} bytes")
    length = int.from_bytes(body[:_PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise PayloadTooLargeError(
            f"safetensors header: expected at most {MAX_HEADER_BYTES} bytes, received a length of {length}"
        )
    end = _PREFIX_BYTES + length
    if end > len(body):
        raise PayloadMalformedError(f"safetensors header: expected {length} bytes, received {len(body)} in all")
    try:
        # the only parser at hand that shows a key given twice
        parsed = json.loads(bytes(body[_PREFIX_BYTES:end]).decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise PayloadMalformedError(f"safetensors header: expected JSON: {str(error)[:120]}") from None
    return expect_object(parsed, field="safetensors header"), end


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _entry(value: object, place: str) -> tuple[Datatype, tuple[int, ...], int, int]:
    entry = expect_object(value, field=place)
    dtype = entry.get("dtype")
    datatype = _BY_NAME.get(dtype) if isinstance(dtype, str) else None
    if datatype is None:
        raise PayloadMalformedError(f"{place}.dtype: expected one of {', '.join(_BY_NAME)}, received {describe(dtype)}")
    shape = check_shape(entry.get("shape"), field=f"{place}.shape")
    offsets = entry.get("data_offsets")
    if type(offsets) is not list or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise PayloadMalformedError(f"{place}.data_offsets: expected two integers, received {describe(offsets)}")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise PayloadMalformedError(f"{place}.data_offsets: expected 0 <= begin <= end, received {begin} and {end}")
    return datatype, shape, begin, end


def _check_ranges(ranges: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for begin, end in sorted(ranges):
        if begin != position:
            raise PayloadMalformedError(
                f"safetensors data: expected a tensor to begin at byte {position}, received {begin} (overlap or hole)"
            )
        position = end
    if position != data_bytes:
        raise PayloadMalformedError(f"safetensors data: expected {position} bytes, received {data_bytes}")
