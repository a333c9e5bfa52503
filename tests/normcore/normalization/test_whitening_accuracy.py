"""Whitening against its formula at 50 digits, and by what its output's covariance is."""

import mpmath  # type: ignore[import-untyped]  # it ships no types
import pytest
import torch
from torch import Tensor

from normcore.normalization import whitening

MODES = ["zca", "pca", "cholesky", "iternorm"]
EXACT_MODES = MODES[:3]
TOLERANCE = {torch.float64: 2e-14, torch.float32: 1e-7, torch.float16: 1e-7, torch.bfloat16: 1e-7}


def _correlated(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Channels that share much of their spread, away from zero."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channels = torch.arange(1.0, shape[1] + 1, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))
    correlated: Tensor = values * channels + 2 * values.mean(1, keepdim=True) + 3 * channels
    return correlated.to(dtype)


def _conditioned(condition: float, *, mean: float = 0.0) -> Tensor:
    """(4096, 12) values whose covariance has about this condition number; float64."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    scales = torch.tensor(condition, dtype=torch.float64) ** torch.linspace(0.0, -0.5, 12, dtype=torch.float64)
    values = torch.randn(4096, 12, generator=generator, dtype=torch.float64)
    conditioned: Tensor = (values * scales) @ basis.T + mean
    return conditioned


def _distance_from_identity(output: Tensor) -> float:
    """Of the covariance of an (M, d) output, max |cov - I|."""
    deviations = output.double() - output.double().mean(0)
    covariance = deviations.T @ deviations / len(output)
    return float((covariance - torch.eye(output.shape[1])).abs().max())


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _oracle_matrix(covariance: mpmath.matrix, mode: str) -> mpmath.matrix:
    size = covariance.rows
    if mode == "cholesky":
        return mpmath.inverse(mpmath.cholesky(covariance))
    if mode == "iternorm":
        trace = mpmath.fsum(covariance[i, i] for i in range(size))
        matrix = mpmath.eye(size)
        for _ in range(5):
            matrix = 1.5 * matrix - 0.5 * matrix**3 * covariance / trace
        return matrix / mpmath.sqrt(trace)
    values, basis = mpmath.eigsy(covariance)
    scaled = mpmath.diag([1 / mpmath.sqrt(value) for value in values]) * basis.T
    if mode == "zca":
        return basis * scaled
    rows = [scaled[i, :] for i in reversed(range(size))]
    return mpmath.matrix([[v * mpmath.sign(max(row, key=abs)) for v in row] for row in rows])


def _oracle(values: Tensor, mode: str, *, eps: float) -> mpmath.matrix:
    """The formula, for (M, d) values."""
    rows = mpmath.matrix(values.double().tolist())
    count, size = rows.rows, rows.cols
    means = [mpmath.fsum(rows[:, j]) / count for j in range(size)]
    centred = mpmath.matrix([[rows[i, j] - means[j] for j in range(size)] for i in range(count)])
    covariance = centred.T * centred / count + mpmath.mpf(eps) * mpmath.eye(size)
    return centred * _oracle_matrix(covariance, mode).T


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_output_equals_the_formula_at_50_digits(mode: str, dtype: torch.dtype) -> None:
    input = _correlated(20, 6, dtype=dtype)
    weight, bias = torch.linspace(-1, 2, 6), torch.linspace(0, 1, 6)
    result = whitening(input, None, None, weight, bias, mode=mode, groups=2, training=True, eps=1e-3)
    assert result.output.dtype == dtype
    with mpmath.workdps(50):
        for columns in (slice(0, 3), slice(3, 6)):
            expected = _oracle(input[:, columns], mode, eps=1e-3)
            true = torch.tensor(expected.tolist(), dtype=torch.float64) * weight[columns].double()
            error = (result.output[:, columns].double() - (true + bias[columns].double())).abs()
            half_ulp = true.abs().clamp_min(1.0) * torch.finfo(dtype).eps
            assert bool((error <= half_ulp + TOLERANCE[dtype]).all())


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8], ids="{:.0e}".format)
@pytest.mark.parametrize("mode", MODES)
def test_output_is_white_whatever_the_condition(mode: str, condition: float, mean: float) -> None:
    wide = _conditioned(condition, mean=mean)
    for input, tolerance in ((wide.float(), 1e-6), (wide, 5e-16 * condition + 1e-13)):
        output = whitening(input, mode=mode, iterations=40, training=True, eps=0.0).output
        assert _distance_from_identity(output) <= tolerance


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_covariance_of_the_output_lacks_what_eps_adds(mode: str) -> None:
    input = _correlated(50, 4, dtype=torch.float64)
    result = whitening(input, mode=mode, training=True, eps=0.5)
    matrix = _given(result.whitening_matrix)[0]
    covariance = torch.cov(result.output.T, correction=0)
    assert torch.allclose(covariance, torch.eye(4).double() - 0.5 * matrix @ matrix.T, atol=1e-13)
    assert torch.allclose(_given(result.covariance)[0], torch.cov(input.T, correction=0))
    assert torch.allclose(_given(result.mean), input.mean(0))


def test_modes_are_the_matrices_that_their_names_say() -> None:
    input = _correlated(50, 4, dtype=torch.float64)
    zca, pca, cholesky = (
        _given(whitening(input, mode=mode, training=True).whitening_matrix)[0] for mode in EXACT_MODES
    )
    assert torch.equal(zca, zca.T)
    assert torch.equal(cholesky, cholesky.tril())
    assert bool((cholesky.diagonal() > 0).all())
    gram = pca @ pca.T
    assert torch.allclose(gram, gram.diag().diag(), atol=1e-12)
    assert bool((gram.diag().diff() > 0).all())
    assert bool((pca.gather(1, pca.abs().argmax(1, keepdim=True)) > 0).all())


def test_iternorm_is_partial_and_does_not_diverge() -> None:
    input = _conditioned(1e2)
    residuals = []
    for iterations in (1, 5, 10, 20, 100):
        result = whitening(input, mode="iternorm", iterations=iterations, training=True, eps=0.0)
        residuals.append(_distance_from_identity(result.output))
        if residuals[-1] > 0.01:
            assert result.diagnostics() == {"whitening_residual": pytest.approx(residuals[-1], rel=1e-9)}
        else:
            assert result.diagnostics() == {}
    assert residuals[0] > residuals[1] > 0.3
    assert residuals[2] < residuals[1]
    assert max(residuals[3:]) < 1e-12
    covariance = torch.cov(input.T, correction=0)
    inverse_root = torch.eye(12).double()
    for _ in range(60):
        inverse_root = 1.5 * inverse_root - 0.5 * inverse_root @ inverse_root @ inverse_root @ covariance / 50
    assert not bool(inverse_root.isfinite().all())
