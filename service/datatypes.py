"""The one table of datatypes, with their names in the protocol, numpy, Triton configurations and safetensors.

BYTES is an object array of `bytes`; its `itemsize` is 0 because its elements have lengths of their own.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from service.errors import PayloadMalformedError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Datatype:
    """One row of the table; `safetensors` is None where that format has no such type."""

    name: str
    itemsize: int
    numpy: np.dtype[Any]
    triton: str
    safetensors: str | None
    is_float: bool = False


BYTES = Datatype("BYTES", 0, np.dtype(object), "TYPE_STRING", None)
BOOL = Datatype("BOOL", 1, np.dtype(np.bool_), "TYPE_BOOL", "BOOL")
FP32 = Datatype("FP32", 4, np.dtype(np.float32), "TYPE_FP32", "F32", is_float=True)
FP64 = Datatype("FP64", 8, np.dtype(np.float64), "TYPE_FP64", "F64", is_float=True)
DATATYPES = (
    BOOL,
    Datatype("UINT8", 1, np.dtype(np.uint8), "TYPE_UINT8", "U8"),
    Datatype("UINT16", 2, np.dtype(np.uint16), "TYPE_UINT16", "U16"),
    Datatype("UINT32", 4, np.dtype(np.uint32), "TYPE_UINT32", "U32"),
    Datatype("UINT64", 8, np.dtype(np.uint64), "TYPE_UINT64", "U64"),
    Datatype("INT8", 1, np.dtype(np.int8), "TYPE_INT8", "I8"),
    Datatype("INT16", 2, np.dtype(np.int16), "TYPE_INT16", "I16"),
    Datatype("INT32", 4, np.dtype(np.int32), "TYPE_INT32", "I32"),
    Datatype("INT64", 8, np.dtype(np.int64), "TYPE_INT64", "I64"),
    Datatype("FP16", 2, np.dtype(np.float16), "TYPE_FP16", "F16", is_float=True),
    Datatype("BF16", 2, np.dtype(ml_dtypes.bfloat16), "TYPE_BF16", "BF16", is_float=True),
    FP32,
    FP64,
    BYTES,
)
_BY_NAME = {row.name: row for row in DATATYPES}
_BY_NUMPY = {row.numpy: row for row in DATATYPES}


def by_name(name: object, *, field: str = "datatype") -> Datatype:
    """Return the row of a protocol name; `field` says in the refusal where the name stood."""
    row = _BY_NAME.get(name) if isinstance(name, str) else None
    if row is None:
        received = repr(name[:40]) if isinstance(name, str) else type(name).__name__
        raise PayloadMalformedError(f"{field}: expected one of {', '.join(_BY_NAME)}, received {received}")
    return row


def of(array: NDArray[Any]) -> Datatype:
    """Return the row of an array in native byte order."""
    return of_numpy(array.dtype)


def of_numpy(dtype: np.dtype[Any]) -> Datatype:
    """Return the row of numpy's type."""
    row = _BY_NUMPY.get(dtype)
    if row is None:
        raise UnsupportedError(f"tensor of numpy type {dtype}: expected one of {', '.join(_BY_NAME)}")
    return row
