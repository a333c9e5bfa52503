"""Named tensors on their way to a sandbox's child: raw bytes in one file, and where in it each tensor lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service import datatypes
from service.engine.protocol import Tensor, Tensors

_ALIGNMENT = 64

Places = list[dict[str, Any]]


def lay_out(batches: Sequence[Tensors]) -> tuple[list[Places], list[memoryview]]:
    """Per batch the places of its tensors, and the file's content in pieces, which are views of the tensors."""
    places: list[Places] = []
    chunks: list[memoryview] = []
    offset = 0
    for batch in batches:
        places.append([])
        for name, array in batch.items():
            shape, datatype = list(array.shape), datatypes.of(array).name
            places[-1].append({"name": name, "datatype": datatype, "shape": shape, "offset": offset})
            padding = -array.nbytes % _ALIGNMENT
            chunks += (_bytes_of(array), memoryview(bytes(padding)))
            offset += array.nbytes + padding
    return places, chunks


def read(path: Path, batches: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Tensor]]:
    """The batches, as views of the mapped file."""
    content = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.empty(0, np.uint8)
    return [{place["name"]: _view(content, place) for place in places} for places in batches]


def _bytes_of(array: Tensor) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _view(content: Tensor, place: Mapping[str, Any]) -> Tensor:
    datatype = datatypes.by_name(place["datatype"])
    size = int(np.prod(place["shape"], dtype=np.int64)) * datatype.itemsize
    return content[place["offset"] : place["offset"] + size].view(datatype.numpy).reshape(place["shape"])
