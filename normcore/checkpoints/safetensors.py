"""safetensors files: a JSON header, then the tensors' bytes end to end; read with suspicion."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from normcore.checkpoints.tensors import (
    DATATYPES,
    Tensor,
    TensorFile,
    TensorLimits,
    check_name,
    check_shape,
    check_total,
    contiguous_strides,
    quote,
)
from normcore.errors import CheckpointError

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


class _DuplicateKeyError(ValueError):
    pass


def open_safetensors(path: Path, *, limits: TensorLimits) -> TensorFile:
    """Where every tensor of a safetensors file lies, once the header is known to be sound.

    Offsets must cover the file's data without a hole or an overlap, and every range must be as long as datatype and
    shape say.

    Raises:
        CheckpointError: the header is damaged, too large, or contradicts itself or the file's length.
    """
    header, data_start = _read_header(path, limits)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"the safetensors header's {_METADATA} does not map texts to texts")
    if len(header) > limits.max_tensors:
        raise CheckpointError(f"the file names {len(header)} tensors, more than the {limits.max_tensors} allowed")
    ranges: list[tuple[int, int, str]] = []
    tensors = {name: _tensor(name, entry, data_start, ranges) for name, entry in header.items()}
    _check_coverage(ranges, path.stat().st_size - data_start)
    check_total(tensors, limits)
    return TensorFile(path=path, format="safetensors", tensors=tensors, keeps_order=False)


def _read_header(path: Path, limits: TensorLimits) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise CheckpointError("the safetensors file is truncated: it ends inside its header")
        if length > limits.max_header_bytes:
            raise CheckpointError(
                f"the safetensors header has {length} bytes, more than the {limits.max_header_bytes} allowed"
            )
        text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError("the safetensors header does not begin with '{'")
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"the safetensors header names {quote(str(error))} twice") from None
    except (ValueError, RecursionError):
        raise CheckpointError("the safetensors header is not valid JSON in UTF-8") from None
    return header, _LENGTH_BYTES + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _tensor(name: str, entry: object, data_start: int, ranges: list[tuple[int, int, str]]) -> Tensor:
    check_name(name)
    if not isinstance(entry, Mapping) or set(entry) != _FIELDS:
        raise CheckpointError(f"tensor {quote(name)}: its entry is not exactly dtype, shape and data_offsets")
    datatype = entry["dtype"]
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise CheckpointError(
            f"tensor {quote(name)}: the datatype {quote(str(datatype))} is not one of {', '.join(DATATYPES)}"
        )
    shape = check_shape(name, entry["shape"])
    begin, end = _offsets(name, entry["data_offsets"])
    tensor = Tensor(datatype, shape, data_start + begin, contiguous_strides(shape))
    if tensor.nbytes != end - begin:
        raise CheckpointError(
            f"tensor {quote(name)}: {datatype} of shape {list(shape)} takes {tensor.nbytes} bytes, "
            f"and its range has {end - begin}"
        )
    ranges.append((begin, end, name))
    return tensor


def _offsets(name: str, offsets: object) -> tuple[int, int]:
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        begin: int = offsets[0]
        end: int = offsets[1]
        if 0 <= begin <= end:
            return begin, end
    raise CheckpointError(f"tensor {quote(name)}: its data_offsets are no range")


def _check_coverage(ranges: list[tuple[int, int, str]], size: int) -> None:
    end = 0
    for begin, stop, name in sorted(ranges):
        if begin != end:
            problem = "overlaps the one before it" if begin < end else "leaves a hole before it"
            raise CheckpointError(f"tensor {quote(name)}: its range {problem}")
        end = stop
    if end != size:
        problem = "truncated" if end > size else "followed by bytes that belong to no tensor"
        raise CheckpointError(f"the data of the safetensors file is {problem}: {size} bytes, {end} declared")


__all__ = ["open_safetensors"]
