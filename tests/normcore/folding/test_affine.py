from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normcore.errors import StatisticsError
from normcore.folding.affine import Affine, affine_of, identity


def test_equals_batch_norm() -> None:
    generator = np.random.default_rng(0)
    x, weight, bias, mean = generator.standard_normal((4, 6))
    var = generator.uniform(0.1, 3.0, 6)
    affine = affine_of(weight, bias, mean, var, eps=1e-3)
    expected = (x - mean) / np.sqrt(var + 1e-3) * weight + bias
    np.testing.assert_allclose(affine.scale * x + affine.shift, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16], ids=["fp16", "fp32", "bf16"])
def test_computes_in_float64(dtype: type) -> None:
    vector: np.ndarray[Any, Any] = np.asarray([0.1, 3.0], dtype)
    affine = affine_of(vector, vector, vector, vector, eps=1e-5)
    exact = vector.astype(np.float64)
    scale = exact / np.sqrt(exact + 1e-5)
    np.testing.assert_array_equal(affine.scale, scale)
    np.testing.assert_array_equal(affine.shift, exact - exact * scale)


def test_composes_in_order() -> None:
    first, second = Affine(np.array([2.0, 3.0]), np.array([1.0, 0.0])), Affine(np.array([5.0, 7.0]), np.ones(2))
    x = np.array([1.5, -2.0])
    both = second.after(first)
    np.testing.assert_array_equal(
        both.scale * x + both.shift, second.scale * (first.scale * x + first.shift) + second.shift
    )
    np.testing.assert_array_equal(second.after(identity(2)).shift, second.shift)


def test_knows_uniform_and_unshifted_maps() -> None:
    assert identity(3).is_uniform
    assert not identity(3).is_shifting
    assert not Affine(np.array([1.0, 2.0]), np.zeros(2)).is_uniform
    assert Affine(np.ones(2), np.array([0.0, 1.0])).is_shifting


@pytest.mark.parametrize(
    ("weight", "var", "eps", "argument"),
    [
        pytest.param(1.0, -0.1, 1.0, "var", id="negative"),
        pytest.param(1.0, 0.0, 0.0, "var + eps", id="zero"),
        pytest.param(1.0, 1.0, -2.0, "var + eps", id="negative-eps"),
        pytest.param(1.0, 1.0, np.nan, "var + eps", id="nan-eps"),
        pytest.param(np.nan, 1.0, 1e-5, "weight", id="nan"),
        pytest.param(1.0, np.inf, 1e-5, "var", id="infinite"),
    ],
)
def test_refuses_unusable_statistics(weight: float, var: float, eps: float, argument: str) -> None:
    one = np.ones(2)
    with pytest.raises(StatisticsError) as caught:
        affine_of(np.array([1.0, weight]), one, one, np.array([1.0, var]), eps=eps)
    assert caught.value.argument == argument
