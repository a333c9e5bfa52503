"""The standardize family with derivatives of every order.

How a method uses it: see the input so that statistics are taken over whole `axes`, and weight and bias so that they
broadcast against that view ((C, 1, 1), (D,), (G, C // G, 1), ...), as views or by naming the shapes (`seen`); call
`standardize_over` (the statistics are the input's own) or `standardize_by` (they are given). The output is
differentiable to every order in input, weight and bias. What is standardized already, by other means, gets its
derivatives from `differentiable`. Where there is no autograd, as under torch.inference_mode, `standardize_gradients`
gives the same gradients.

Forward and backward run in the fast kernel; the double backward is a closed form in plain differentiable operations.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normcore._checks import refuse_tangents
from normcore._precision import accumulation_dtype
from normcore.normalization.closed_forms import Statistics, as_functions, double_backward
from normcore.normalization.kernel import AS_GIVEN, Seen, Standardized, standardize, standardize_given, standardize_own
from normcore.normalization.kernel_backward import backward

__all__ = [
    "AS_GIVEN",
    "Gradients",
    "Seen",
    "Standardized",
    "Statistics",
    "differentiable",
    "standardize_by",
    "standardize_gradients",
    "standardize_over",
    "standardize_with",
]


class Gradients(NamedTuple):
    """Gradients of the input, and of weight and bias in the shape asked for."""

    input: Tensor
    weight: Tensor
    bias: Tensor


def standardize_over(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axes: tuple[int, ...],
    eps: float,
    has_mean: bool = True,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    seen: Seen = AS_GIVEN,
) -> Standardized:
    """Standardize by the input's own statistics over `axes`; `has_mean` false is the RMS form.

    Args:
        input: any shape, floating, with values along the axes.
        weight: broadcasts against the input; any floating datatype.
        bias: the same.
        axes: those to reduce, from the front, in increasing order.
        eps: added to the variance.
        has_mean: whether the mean is subtracted.
        mask: bool, broadcasts against the input; true where a position is counted. At least one is, per statistic.
        out: takes the output; like the input, in memory of its own.
        seen: the shapes in which axes, mask, weight and bias are meant, where those are others than their own.
    """
    found = standardize_own(input, weight, bias, axes=axes, eps=eps, has_mean=has_mean, mask=mask, out=out, seen=seen)
    return differentiable(found, input, weight, bias, seen=seen)


def standardize_by(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mean: Tensor,
    var: Tensor,
    eps: float,
    out: Tensor | None = None,
    seen: Seen = AS_GIVEN,
) -> Standardized:
    """Standardize by given statistics, constants that broadcast against the input."""
    found = standardize_given(input, weight, bias, mean=mean, var=var, eps=eps, out=out, seen=seen)
    return differentiable(found, input, weight, bias, seen=seen)


def standardize_with(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, by: Statistics, *, out: Tensor | None = None
) -> Standardized:
    """Standardize by statistics found before: the input's own, which its derivatives take into account, or given."""
    return differentiable(Standardized(standardize(input, by, weight, bias, out=out), by), input, weight, bias)


def differentiable(
    found: Standardized,
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    seen: Seen = AS_GIVEN,
) -> Standardized:
    """The same with derivatives of the output, which was computed without, from these tensors."""
    if not is_recorded(input, weight, bias):
        return found
    # Function.apply has no types in torch.
    output: Tensor = _Standardize.apply(input, weight, bias, found, seen)  # type: ignore[no-untyped-call]
    return Standardized(output, found.statistics)


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see what is done with the tensors."""
    refuse_tangents(*tensors)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def standardize_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Statistics,
    *,
    affine_shape: tuple[int, ...],
    seen: Seen = AS_GIVEN,
) -> Gradients:
    """The closed-form backward, without autograd.

    Args:
        grad_output: shape of the input.
        input: what was standardized.
        weight: that of the forward.
        statistics: of the forward's result.
        affine_shape: shape of the gradients of weight and bias: the weight's where there is one; broadcasts against
            the input, but for shapes that are seen as others.
        seen: the shapes in which they are seen, where those are others than their own.

    Returns:
        The input's gradient in its datatype, the others in the datatype computed in.
    """
    dtype = accumulation_dtype(input.dtype)
    how: dict[str, Any] = {"affine_shape": affine_shape, "dtype": dtype, "seen": seen}
    return Gradients(*backward(grad_output, input, weight, statistics, **how))


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, found: Standardized, seen: Seen
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.statistics, ctx.seen = found.statistics, seen
        return found.output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (input, weight, bias), seen = ctx.saved_tensors, ctx.seen
        if not is_recorded(grads[0], input, weight, bias):
            return (*_gradients(grads[0], input, weight, bias, ctx.statistics, seen), None, None)
        values = seen.values(grads[0]), seen.values(input), seen.parameter(weight), seen.parameter(bias)
        gradients = _StandardizeBackward.apply(*values, ctx.statistics)  # type: ignore[no-untyped-call]  # torch has none
        of_own = (
            None if own is None else grad.reshape(own.shape)
            for grad, own in zip(gradients, (input, weight, bias), strict=True)
        )
        return (*of_own, None, None)


class _StandardizeBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad_output, input, weight)
        ctx.statistics = statistics
        return _gradients(grad_output, input, weight, bias, statistics, AS_GIVEN)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, weight = ctx.saved_tensors
        # For third and higher derivatives, mean and invstd have to be functions of the input here.
        by = as_functions(input, ctx.statistics) if torch.is_grad_enabled() else ctx.statistics
        grads = double_backward(cotangents, grad_output, input, weight, by)
        own = (_like(grad, like) for grad, like in zip(grads, (grad_output, input, weight), strict=True))
        return (*own, None, None)


def _gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics, seen: Seen
) -> tuple[Tensor | None, ...]:
    given = bias if weight is None else weight
    affine = (seen.affine or (1,) * input.ndim) if given is None else tuple(given.shape)
    # Rounded once, in whichever datatype each parameter has.
    is_one = given is None or bias is None or bias.dtype is given.dtype
    dtype = given.dtype if is_one and given is not None else torch.float64
    of_input, of_weight, of_bias = backward(
        grad_output, input, weight, statistics, affine_shape=affine, dtype=dtype, seen=seen
    )
    return of_input, _like(of_weight, weight), _like(of_bias, bias)


def _like(grad: Tensor, like: Tensor | None) -> Tensor | None:
    if like is None:
        return None
    own = grad if grad.shape == like.shape else grad.sum_to_size(like.shape)
    return own if own.dtype == like.dtype else own.to(like.dtype)
