"""Four evaluations of one tensor - native and float64, original and folded - and what they say together.

A folded network is as good as the original when its error against float64 is at most `4 x` the original's plus
`8 ulp` of the largest element: it stores other weights, so its rounding errors are other draws of the same size.
"""

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FACTOR = 4.0
_ULPS = 8.0
_MIN_SPREAD = 1e-3  # of the largest element: an output that hardly varies says nothing
_CREDIBLE_EPS = 8192.0  # an original further from float64 than this many eps says nothing either
_MAX_CREDIBLE_ERROR = 0.05
_SUSPICION = 64.0
_TOLERATED_SHARE = 1e-3  # of an integer output: ties that rounding breaks differently


@dataclass(frozen=True, slots=True)
class Evaluations:
    """One tensor of one probe, evaluated four times."""

    native_original: Array
    native_folded: Array
    exact_original: Array
    exact_folded: Array


@dataclass(frozen=True, slots=True)
class Comparison:
    """Errors are max|a - b| over the tensor, or the share of differing elements where it holds no floats.

    Attributes:
        scale: max|exact_original|, or 1 where it holds no floats.
        original: native_original against exact_original.
        folded: native_folded against exact_original.
        between: native_folded against native_original.
        exact: exact_folded against exact_original.
        bound: what `folded` and `exact` may be.
        reason: why this can tell nothing: the tensor hardly varies, or the original itself is far from float64.
        is_explained: another tensor, from which both compute this one alike, was found equivalent.
    """

    scale: float
    original: float
    folded: float
    between: float
    exact: float
    bound: float
    reason: str | None = None
    is_explained: bool = False

    @property
    def conclusive(self) -> bool:
        return self.reason is None

    @property
    def equivalent(self) -> bool:
        return self.is_explained or max(self.folded, self.exact) <= self.bound

    @property
    def is_suspect(self) -> bool:
        """Whether it fails by so little that more draws of the rounding errors could show them to be of one size."""
        return not self.equivalent and max(self.folded, self.exact) <= _SUSPICION * self.bound

    def pool(self, other: "Comparison") -> "Comparison":
        """The larger of each number: two draws of the rounding errors together."""
        return replace(
            self,
            original=max(self.original, other.original),
            folded=max(self.folded, other.folded),
            between=max(self.between, other.between),
            exact=max(self.exact, other.exact),
            bound=max(self.bound, other.bound),
        )


def compare(tensor: Evaluations) -> Comparison:
    """Measure one tensor. Both networks give it one shape, else it is different by infinity."""
    native, exact_shape = tensor.native_original.shape, tensor.exact_original.shape
    if (native, exact_shape) != (tensor.native_folded.shape, tensor.exact_folded.shape):
        return _different()
    if native != exact_shape:
        return _silent(f"its shape is {native} at run time and {exact_shape} in float64")
    if not is_float(tensor.native_original):
        return _compare_discrete(tensor)
    original, folded = tensor.native_original.astype(np.float64), tensor.native_folded.astype(np.float64)
    exact, exact_folded = tensor.exact_original, tensor.exact_folded
    finite = np.isfinite(exact)
    if (np.isfinite(original) & ~np.isfinite(folded)).any():
        return _different()
    if np.isfinite(original).sum() < finite.sum():
        return _silent("the original overflows, which leaves nothing to compare with")
    if not (same_infinities(exact, exact_folded) and same_infinities(original, folded)):
        return _different()
    finite &= np.isfinite(original)
    original, folded, exact, exact_folded = original[finite], folded[finite], exact[finite], exact_folded[finite]
    scale = largest(exact)
    eps = epsilon(tensor.native_original.dtype)
    error = largest(original - exact)
    return Comparison(
        scale=scale,
        original=error,
        folded=largest(folded - exact),
        between=largest(folded - original),
        exact=largest(exact_folded - exact),
        bound=_FACTOR * error + _ULPS * ulp(scale, eps),
        reason=_obstacle(exact, scale, error, min(_CREDIBLE_EPS * eps, _MAX_CREDIBLE_ERROR) * scale),
    )


def is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def largest(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0))


def epsilon(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]  # ml_dtypes does not type it


def ulp(value: float, eps: float) -> float:
    """Distance between neighbours at `value` in the datatype with this `eps`."""
    return eps * 2.0 ** float(np.floor(np.log2(value))) if value > 0 else 0.0


def same_infinities(left: Array, right: Array) -> bool:
    """Whether NaN and the infinities stand at the same places."""
    finite = np.isfinite(left)
    if not np.array_equal(finite, np.isfinite(right)):
        return False
    return bool(np.array_equal(left[~finite], right[~finite], equal_nan=True))


def _obstacle(exact: Array, scale: float, error: float, credible: float) -> str | None:
    if not exact.size or not scale or exact.std() < _MIN_SPREAD * scale:
        return f"it varies by less than {_MIN_SPREAD:g} of its largest element"
    if error > credible:
        return f"the original itself is {error / scale:.1e} of its scale away from float64"
    return None


def _compare_discrete(tensor: Evaluations) -> Comparison:
    def share(left: Array, right: Array) -> float:
        return float(np.mean(left != right)) if left.size else 0.0

    error = share(tensor.native_original, tensor.exact_original)
    return Comparison(
        scale=1.0,
        original=error,
        folded=share(tensor.native_folded, tensor.exact_original),
        between=share(tensor.native_folded, tensor.native_original),
        exact=share(tensor.exact_folded, tensor.exact_original),
        bound=_FACTOR * error + _TOLERATED_SHARE,
        reason=_discrete_obstacle(tensor.native_original.size, error),
    )


def _discrete_obstacle(size: int, error: float) -> str | None:
    if not size:
        return "it is empty"
    if error > _MAX_CREDIBLE_ERROR:
        return f"{error:.1%} of the original's elements differ from float64's"
    return None


def _different() -> Comparison:
    infinity = float("inf")
    return Comparison(0.0, 0.0, infinity, infinity, infinity, 0.0)


def _silent(reason: str) -> Comparison:
    return Comparison(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, reason)
