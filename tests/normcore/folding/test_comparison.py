"""The rule of the verdict on four evaluations of one tensor."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normcore.folding.comparison import Comparison, Evaluations, compare

DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}


def measure(dtype: np.dtype[Any], exact: list[float], original: list[float], folded: list[float]) -> Comparison:
    """The folded network is exact in float64."""
    reference = np.array(exact)
    return compare(Evaluations(np.array(original).astype(dtype), np.array(folded).astype(dtype), reference, reference))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_overflow_of_the_folded_network_is_always_a_difference(dtype: np.dtype[Any]) -> None:
    found = measure(dtype, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, np.inf])
    assert not found.equivalent
    assert found.conclusive


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_another_overflow_beside_one_of_the_original_is_a_difference(dtype: np.dtype[Any]) -> None:
    found = measure(dtype, [1.0, 2.0, 3.0], [np.inf, 2.0, 3.0], [np.inf, 2.0, np.nan])
    assert not found.equivalent


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("folded", [[1.0, 2.0, 3.0], [np.inf, 2.0, 3.0]], ids=["cured", "the_same"])
def test_an_overflow_of_the_original_tells_nothing(dtype: np.dtype[Any], folded: list[float]) -> None:
    found = measure(dtype, [1.0, 2.0, 3.0], [np.inf, 2.0, 3.0], folded)
    assert found.equivalent
    assert found.reason == "the original overflows, which leaves nothing to compare with"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_bound_is_of_the_network_s_own_precision(dtype: np.dtype[Any]) -> None:
    """8 ulp of the largest element where the original is exact, and 4 of its errors beside them."""
    ulp = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]  # ml_dtypes does not type it
    exact = [-1.0, 0.5, 1.0]
    assert measure(dtype, exact, exact, [-1.0, 0.5, 1 + 8 * ulp]).equivalent
    assert not measure(dtype, exact, exact, [-1.0, 0.5, 1 + 9 * ulp]).equivalent
    off = [-1.0, 0.5, 1 + ulp]
    assert measure(dtype, exact, off, [-1.0, 0.5, 1 + 12 * ulp]).equivalent
    assert not measure(dtype, exact, off, [-1.0, 0.5, 1 + 13 * ulp]).equivalent


@pytest.mark.parametrize(
    ("exact", "original", "reason"),
    [
        ([1.0, 1.0, 1.0001], [1.0, 1.0, 1.0], "varies by less than 0.001"),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "varies by less than 0.001"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.5], "1.7e-01 of its scale away from float64"),
    ],
    ids=["constant", "zero", "lost"],
)
def test_what_tells_nothing_says_why(exact: list[float], original: list[float], reason: str) -> None:
    found = measure(np.dtype(np.float32), exact, original, original)
    assert not found.conclusive
    assert reason in (found.reason or "")


def test_another_shape_is_the_folded_network_s_fault_only_where_the_original_has_none_such() -> None:
    row, column = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0], [2.0], [3.0]])
    native = row.astype(np.float32)
    assert not compare(Evaluations(native, column.astype(np.float32), row, row)).equivalent
    assert not compare(Evaluations(native, native, row, column)).equivalent
    beside = compare(Evaluations(native, native, column, column))
    assert not beside.conclusive
    assert "(1, 3) at run time and (3, 1) in float64" in (beside.reason or "")
