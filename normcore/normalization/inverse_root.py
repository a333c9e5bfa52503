"""Matrices W with W S W^T = I for a symmetric positive definite S, and what a gradient of W is as a gradient of S.

S and W are batches (groups, d, d) of float64. Every way to find W is differentiable to any order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from normcore.errors import StatisticsError

MODES_WITH_PULLBACK = ("zca", "cholesky")
MODES = (*MODES_WITH_PULLBACK, "pca", "iternorm")


@dataclass(frozen=True, slots=True)
class InverseRoot:
    """A W for every group.

    Attributes:
        matrix: W, (groups, d, d).
        definiteness: how far S is from singular, about its smallest eigenvalue over its largest; (groups,). Where it
            is not above rounding, W has no meaning.
        pullback: takes the gradient of W to that of S; of MODES_WITH_PULLBACK only.
    """

    matrix: Tensor
    definiteness: Tensor
    pullback: Callable[[Tensor], Tensor] | None = None


def inverse_root(covariance: Tensor, *, argument: str, mode: str, iterations: int, eps: float) -> InverseRoot:
    """W for S = covariance + eps I by one of MODES; NaN in the groups whose covariance is not finite.

    Args:
        covariance: (groups, d, d), symmetric.
        argument: what the covariance comes from, for the error.
        mode: one of MODES.
        iterations: of mode iternorm.
        eps: added to the variances.

    Raises:
        StatisticsError: S is not positive definite beyond rounding.

    >>> covariance = torch.tensor([[[4.0, 0.0], [0.0, 0.25]]], dtype=torch.float64)
    >>> inverse_root(covariance, argument="input", mode="zca", iterations=5, eps=0.0).matrix
    tensor([[[0.5000, 0.0000],
             [0.0000, 2.0000]]], dtype=torch.float64)
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    is_finite = covariance.isfinite().flatten(1).all(1)[:, None, None]
    root = _root(torch.where(is_finite, covariance + eps * identity, identity), mode, iterations=iterations)
    is_definite = root.definiteness > _rounding_bound(covariance)
    if not bool(is_definite.all()):
        expected = "a covariance that is positive definite beyond rounding once eps is added"
        received = f"{int((~is_definite).sum())} of {len(is_definite)} groups where it is not (eps {eps:g})"
        raise StatisticsError(argument, expected=expected, received=received)
    return replace(root, matrix=root.matrix.masked_fill(~is_finite, torch.nan))


def _rounding_bound(covariance: Tensor) -> float:
    """The share of the largest eigenvalue below which an eigenvalue is rounding alone."""
    return covariance.shape[-1] * torch.finfo(covariance.dtype).eps


def _root(covariance: Tensor, mode: str, *, iterations: int) -> InverseRoot:
    if mode == "zca":
        return _symmetric(covariance)
    if mode == "pca":
        return _principal(covariance)
    if mode == "cholesky":
        return _triangular(covariance)
    return InverseRoot(_newton_schulz(covariance, iterations=iterations), _inverse_factor(covariance.detach())[1])


def _symmetric(covariance: Tensor) -> InverseRoot:
    matrix, basis, roots = _SymmetricRoot.apply(covariance)  # type: ignore[no-untyped-call]  # torch types no apply

    def pullback(grad_matrix: Tensor) -> Tensor:
        return _symmetric_pullback(covariance, matrix, basis, roots, grad_matrix)

    return InverseRoot(matrix, (roots[:, 0] / roots[:, -1]).square(), pullback)


def _principal(covariance: Tensor) -> InverseRoot:
    """Rows in order of falling variance; the component of a row that is largest by magnitude is positive."""
    values, basis = torch.linalg.eigh(covariance)
    bound = _rounding_bound(covariance) * values[:, -1:]
    if values.requires_grad and bool((values.diff(dim=-1) <= bound).any()):
        expected = "distinct eigenvalues of the covariance for a gradient in mode pca"
        raise StatisticsError("input", expected=expected, received="repeated ones")
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    matrix = (basis * (largest.sign() * values.rsqrt()[:, None, :])).mT.flip(-2)
    return InverseRoot(matrix, (values[:, 0] / values[:, -1]).detach())


def _triangular(covariance: Tensor) -> InverseRoot:
    matrix, definiteness = _TriangularRoot.apply(covariance)  # type: ignore[no-untyped-call]  # as above

    def pullback(grad_matrix: Tensor) -> Tensor:
        return _triangular_pullback(matrix, grad_matrix)

    return InverseRoot(matrix, definiteness, pullback)


def _newton_schulz(covariance: Tensor, *, iterations: int) -> Tensor:
    """S^-1/2, more nearly with each iteration.

    The coupled form: Z <- (3 I - Z Y) Z / 2 with Y = S Z / tr(S) kept beside it. It is P <- (3 P - P^3 S / tr(S)) / 2
    but for rounding, which that one amplifies until it diverges.
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    product, inverse = covariance / trace, identity.expand_as(covariance)
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * inverse @ product
        product, inverse = product @ step, step @ inverse
    return inverse / trace.sqrt()


class _SymmetricRoot(torch.autograd.Function):
    """S -> S^-1/2, and the eigenvectors and root eigenvalues of S as constants.

    Autograd through the eigenvectors would divide by differences of eigenvalues; this only divides by sums of roots.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, basis = torch.linalg.eigh(covariance)
        roots = values.sqrt()
        half = basis * roots.rsqrt()[:, None, :]
        matrix = half @ half.mT
        ctx.save_for_backward(covariance, matrix, basis, roots)
        ctx.mark_non_differentiable(basis, roots)
        return matrix, basis, roots

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        covariance, matrix, basis, roots = ctx.saved_tensors
        return _symmetric_pullback(covariance, matrix, basis, roots, grads[0])


def _symmetric_pullback(
    covariance: Tensor, matrix: Tensor, basis: Tensor, roots: Tensor, grad_matrix: Tensor
) -> Tensor:
    """By dW = -W dR W for the root R, and dS = R dR + dR R: both are their own adjoints."""
    inner = matrix @ _symmetrized(grad_matrix) @ matrix
    solution: Tensor = _Lyapunov.apply(covariance @ matrix, inner, basis, roots)  # type: ignore[no-untyped-call]  # as above
    return -solution


class _Lyapunov(torch.autograd.Function):
    """(R, Q) -> Z with R Z + Z R = Q, for symmetric R and Q and the eigenvectors and eigenvalues of R."""

    @staticmethod
    def forward(ctx: FunctionCtx, root: Tensor, right: Tensor, basis: Tensor, roots: Tensor) -> Tensor:
        sums = roots[:, :, None] + roots[:, None, :]
        solution = basis @ ((basis.mT @ right @ basis) / sums) @ basis.mT
        ctx.save_for_backward(root, solution, basis, roots)
        return solution

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        root, solution, basis, roots = ctx.saved_tensors
        right = _symmetrized(grads[0])
        grad_right = _Lyapunov.apply(root, right, basis, roots)  # type: ignore[no-untyped-call]  # as above
        return -2.0 * _symmetrized(grad_right @ solution), grad_right, None, None


class _TriangularRoot(torch.autograd.Function):
    """S -> L^-1 with S = L L^T and L lower triangular, and how definite S is as a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, covariance: Tensor) -> tuple[Tensor, Tensor]:
        matrix, definiteness = _inverse_factor(covariance)
        ctx.save_for_backward(matrix)
        ctx.mark_non_differentiable(definiteness)
        return matrix, definiteness

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        return _triangular_pullback(matrix, grads[0])


def _inverse_factor(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of Cholesky's factor, and a definiteness: 0 where there is no factor.

    Pivots alone would call some singular matrices definite. The sum of all squares of the inverse is the trace of
    S^-1, which is one to d times what the smallest eigenvalue adds to it.
    """
    factor, failure = torch.linalg.cholesky_ex(covariance)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    matrix = torch.linalg.solve_triangular(factor, identity, upper=False)
    smallest = matrix.square().sum((1, 2)).reciprocal()
    largest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)
    return matrix, (smallest / largest).masked_fill(failure != 0, 0.0)


def _triangular_pullback(matrix: Tensor, grad_matrix: Tensor) -> Tensor:
    """By dW = -lower(W dS W^T) W, where lower keeps half the diagonal."""
    product = grad_matrix @ matrix.mT
    lower = product.tril() - 0.5 * torch.diag_embed(product.diagonal(dim1=-2, dim2=-1))
    return -_symmetrized(matrix.mT @ lower @ matrix)


def _symmetrized(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
