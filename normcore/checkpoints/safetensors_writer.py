"""Writing safetensors: bytes that stay are copied from file to file, the others come block by block."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from normcore.checkpoints.tensors import DATATYPES, Tensor, count, read_tensor
from normcore.errors import CheckpointError

_COPY_BYTES = 1 << 22
_ALIGNMENT = 8

Blocks = Callable[[BinaryIO], Iterator[NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that does not exist yet: `blocks` is given the source and yields its elements in row-major order."""

    datatype: str
    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def nbytes(self) -> int:
        return count(self.shape) * DATATYPES[self.datatype].itemsize


def write_safetensors(
    source: Path,
    target: Path,
    tensors: Mapping[str, Tensor | Computed],
    *,
    metadata: Callable[[], Mapping[str, str]],
    max_header_bytes: int = 16 << 20,
) -> None:
    """Write a file of tensors that are copied out of another file or computed.

    Args:
        source: the file that the `Tensor`s describe and that the blocks of the `Computed` ones may read.
        target: appears at once or not at all.
        tensors: by key.
        metadata: texts for the header, asked for before the tensors are written and again afterwards; of the same
            length both times.
        max_header_bytes: what the header may take, so that the file can be read again.

    Raises:
        CheckpointError: the header would be larger.
        OSError: the disk is full, for one.
    """
    order = sorted(tensors, key=lambda key: -DATATYPES[tensors[key].datatype].itemsize)  # aligned, else as it came
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with source.open("rb") as reading, partial.open("wb") as writing:
            header = _header(tensors, order, metadata())
            if len(header) > max_header_bytes:
                raise CheckpointError(
                    f"the header of the written file would have {len(header)} bytes, more than the "
                    f"{max_header_bytes} allowed"
                )
            writing.write(header)
            for run in _runs(tensors, order):
                _write_run(reading, writing, run)
            finished = _header(tensors, order, metadata())
            if len(finished) != len(header):
                raise ValueError("metadata: expected texts of the same length before and after")
            writing.seek(0)
            writing.write(finished)
            writing.flush()
            os.fsync(writing.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Tensor | Computed], order: Iterable[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        tensor = tensors[key]
        begin, end = end, end + tensor.nbytes
        entries[key] = {"dtype": tensor.datatype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _runs(tensors: Mapping[str, Tensor | Computed], order: Iterable[str]) -> Iterator[Tensor | Computed | range]:
    """What to write in turn; contiguous tensors that follow one another in the source become one range of bytes."""
    pending = range(0)
    for key in order:
        tensor = tensors[key]
        if not isinstance(tensor, Tensor) or not tensor.is_contiguous:
            yield pending
            pending = range(0)
            yield tensor
        elif pending.stop == tensor.offset:
            pending = range(pending.start, tensor.offset + tensor.nbytes)
        else:
            yield pending
            pending = range(tensor.offset, tensor.offset + tensor.nbytes)
    yield pending


def _write_run(reading: BinaryIO, writing: BinaryIO, run: Tensor | Computed | range) -> None:
    if isinstance(run, range):
        _copy(reading, writing, run)
    elif isinstance(run, Tensor):
        writing.write(_bytes(read_tensor(reading, run)))
    else:
        for block in run.blocks(reading):
            writing.write(_bytes(block))


def _bytes(array: NDArray[Any]) -> memoryview:
    """The elements in row-major order; as numbers first, for what numpy has no buffer format for."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _copy(reading: BinaryIO, writing: BinaryIO, span: range) -> None:
    reading.seek(span.start)
    left = len(span)
    while left:
        content = reading.read(min(_COPY_BYTES, left))
        if not content:
            raise OSError("the source became shorter while it was copied")
        writing.write(content)
        left -= len(content)


__all__ = ["Blocks", "Computed", "write_safetensors"]
