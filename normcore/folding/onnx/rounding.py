"""The one cast back from float64 to the datatype of the network's weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from normcore.folding.onnx.refusal import Refusal

Exact = NDArray[np.float64]

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16))
_FLOAT16_TOLERANCE = 2.0**-9  # four times the rounding of a normal number
_BLOCK_ELEMENTS = 1 << 16  # as many in float64 fit into a processor's cache


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it is written, and max|written - exact| / max|exact|."""

    array: NDArray[Any]
    residual: float


def check_float(array: NDArray[Any], name: str) -> None:
    """Refuse weights that are not floating point numbers a linear operator computes with. Raises Refusal."""
    if array.dtype not in _FLOATS:
        raise Refusal(f"{name!r} is of datatype {array.dtype}, and only floating point weights fold")


def store(exact: Exact, dtype: np.dtype[Any], role: str, *, rows: Exact | None = None) -> Stored:
    """Round once.

    Args:
        exact: the tensor as it is laid out in the file.
        dtype: datatype of the file.
        role: what it is, for the reason.
        rows: of a weight, the same numbers as (C, K): one row per output channel.

    Raises:
        Refusal: a number overflows, or a whole channel vanishes in float16.
    """
    array = np.empty(exact.shape, dtype)
    largest, error = _round(exact.copy(), array, role)
    if dtype == np.float16 and rows is not None:
        _check_rows(rows, role)
    return Stored(array, error / largest if largest else 0.0)


def store_scaled(
    weight: NDArray[Any], factor: Exact, dtype: np.dtype[Any], role: str, *, rows: Callable[[Exact], Exact]
) -> Stored:
    """Scale a weight in float64 and round once, block by block: a whole weight in float64 is twice as large.

    Args:
        weight: as it is laid out in the file.
        factor: broadcasts over the weight, and has its rank.
        dtype: datatype of the file.
        role: what it is, for the reason.
        rows: gives the weight as (C, K), one row per output channel.

    Raises:
        Refusal: a number overflows, or a whole channel vanishes in float16.
    """
    if dtype == np.float16 or not weight.size:
        exact = weight.astype(np.float64) * factor
        return store(exact, dtype, role, rows=rows(exact))
    array = np.empty(weight.shape, dtype)
    step = max(1, _BLOCK_ELEMENTS * len(weight) // weight.size)
    scratch = np.empty((min(step, len(weight)), *weight.shape[1:]))
    largest = error = 0.0
    for start in range(0, len(weight), step):
        block = weight[start : start + step]
        exact = scratch[: len(block)]
        np.copyto(exact, block)  # a product of two datatypes takes several times as long
        exact *= factor[start : start + step] if len(factor) > 1 else factor
        found = _round(exact, array[start : start + step], role)
        largest, error = max(largest, found[0]), max(error, found[1])
    return Stored(array, error / largest if largest else 0.0)


def largest_of(array: NDArray[Any]) -> float:
    """max|array|, without a copy of it; NaN where there is one."""
    return float(np.maximum(array.max(initial=0.0), -array.min(initial=0.0)))


def _round(exact: Exact, array: NDArray[Any], role: str) -> tuple[float, float]:
    """Write the one into the other; max|exact| and max|array - exact|. What was exact is lost. Raises Refusal."""
    with np.errstate(under="ignore", over="ignore", invalid="ignore"):
        np.copyto(array, exact, casting="unsafe")
        largest = largest_of(exact)
        if not np.isfinite(np.float64(largest).astype(array.dtype)):
            raise Refusal(f"the folded {role} reaches {largest:.6g}, more than {array.dtype} can hold")
        return largest, largest_of(np.subtract(array, exact, out=exact))


def _check_rows(rows: Exact, role: str) -> None:
    """float16 keeps few digits below 6e-5: a fold must not push a channel there.

    The other datatypes have room down to 1e-38, where no channel tells anything.
    """
    with np.errstate(under="ignore"):
        error = np.abs(rows.astype(np.float16).astype(np.float64) - rows).max(axis=1, initial=0.0)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    is_lost = error > _FLOAT16_TOLERANCE * largest
    if is_lost.any():
        channel = int(np.argmax(is_lost))
        raise Refusal(
            f"the folded {role} of channel {channel} is at most {largest[channel]:.3g}, where float16 would lose "
            f"{error[channel] / largest[channel]:.0%} of it"
        )


__all__ = ["Exact", "Stored", "check_float", "largest_of", "store", "store_scaled"]
