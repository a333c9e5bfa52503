"""Numbers of large arrays by a compiled reader, during which other threads run. Until it is compiled there is none."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.datatypes import BOOL, BYTES, Datatype
from service.engine.protocol import Tensor


class _Reader(Protocol):
    def __call__(self, text: memoryview, *, are_integers: bool = False) -> NDArray[Any] | None: ...


def read(text: memoryview, datatype: Datatype) -> Tensor | None:
    """Numbers, or equally nested lists of them, between commas; None where they have to be read by other means."""
    reader = _compiling()
    if not reader.done() or datatype in (BOOL, BYTES):
        return None
    wide = reader.result()(text, are_integers=not datatype.is_float)
    if wide is None or not _is_in_range(wide, datatype):
        return None
    with np.errstate(over="ignore"):
        array: Tensor = wide.astype(datatype.numpy, copy=False)
    return None if datatype.is_float and np.isinf(array).any() else array


def warm_up() -> None:
    """Wait until it is compiled: seconds the first time, then it is kept on disk. Else the first large array begins."""
    _compiling().result()


@cache
def _compiling() -> Future[_Reader]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="json compiler")
    compiling = pool.submit(_compile)
    pool.shutdown(wait=False)
    return compiling


def _compile() -> _Reader:
    from normcore.decimals import read_decimals  # and numba with it, which takes its time

    read_decimals(b"0")
    return read_decimals


def _is_in_range(wide: NDArray[Any], datatype: Datatype) -> bool:
    if datatype.is_float:
        return True
    limits = np.iinfo(datatype.numpy)
    return bool(limits.min <= wide.min() and wide.max() <= limits.max)
