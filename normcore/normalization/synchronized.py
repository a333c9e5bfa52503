"""Synchronized batch norm: one batch whose samples lie in shards, at several workers or in one process.

What workers exchange merges without loss: 2 C + 1 numbers in the forward, 2 C in the backward. A worker computes

    own = shard_statistics(shard)                               # gather count, mean and m2 of all workers
    batch = own.merge(*others)
    output = standardize_shard(shard, batch, weight, bias)
    sums = shard_gradient_sums(grad_output, shard, batch, weight)         # sum total and dot over all workers
    grad_input = shard_gradient(grad_output, shard, batch, weight, total=total, dot=dot)

and has the gradients of weight and bias of its own shard in its own sums: what reduces all other gradients over the
workers reduces them too. A worker without samples takes part like any other.
"""

import torch
from torch import Tensor

from normcore._checks import check_eps
from normcore.errors import ShapeError, StatisticsError
from normcore.normalization.batch_view import BatchView
from normcore.normalization.closed_forms import Statistics, invstd_of
from normcore.normalization.kernel import own_statistics, standardize
from normcore.normalization.kernel_backward import GradientSums, gradient_sums, input_gradient
from normcore.statistics.moments import Moments


def shard_statistics(shard: Tensor, mask: Tensor | None = None, *, channel_axis: int = 1) -> Moments:
    """Moments of one shard: what a worker sends to all others in the forward.

    Args:
        shard: (n, C, *), floating; it may be empty.
        mask: bool, true where a position counts; broadcasts to the shard's shape without the channel axis.
        channel_axis: axis of the channels, from the back where negative.

    Returns:
        Count, mean and sum of squared deviations, float64 of shape (C,).

    >>> import torch
    >>> shard_statistics(torch.tensor([[1.0], [3.0]])).m2
    tensor([2.], dtype=torch.float64)
    """
    view = BatchView.of(shard, channel_axis=channel_axis)
    counted = view.mask(mask)
    if shard.numel() == 0 or (counted is not None and not bool(counted.any())):
        return Moments.none(view.num_features, device=shard.device)
    # Moments know no eps; any will do.
    return view.moments(own_statistics(shard, axes=view.axes, eps=1.0, mask=counted))


def standardize_shard(
    shard: Tensor,
    batch: Moments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> Tensor:
    """The output of one shard by the moments of the whole batch, without gradient.

    y = (x - mean) / sqrt(m2 / count + eps) * weight + bias

    Args:
        shard: (n, C, *), floating; it may be empty.
        batch: moments of all shards, merged.
        weight: (C,), or (n, C) or the shard's shape for those of each sample or value.
        bias: the weight's shape.
        eps: > 0.
        channel_axis: axis of the channels, from the back where negative.

    Returns:
        A new tensor of the shard's shape and datatype.

    >>> import torch
    >>> parts = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    >>> batch = shard_statistics(parts[0]).merge(shard_statistics(parts[1]))
    >>> standardize_shard(parts[1], batch, eps=1e-12)
    tensor([[1.]])
    """
    view = BatchView.of(shard, channel_axis=channel_axis)
    return standardize(shard, merged_statistics(view, batch, eps=eps), *view.affine(weight, bias))


def shard_gradient_sums(
    grad_output: Tensor,
    shard: Tensor,
    batch: Moments,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> GradientSums:
    """What a worker's backward sums: `total` and `dot` are to be summed over all workers.

    total = sum(a), dot = sum(a xh), a = weight dy; gradients of the shard alone: weight sum(dy xh), bias sum(dy)

    Args:
        grad_output: gradient of the shard's output.
        shard: (n, C, *).
        batch: moments of all shards, merged.
        weight: (C,), or (n, C) or the shard's shape for those of each sample or value.
        mask: that of the forward.
        eps: that of the forward.
        channel_axis: that of the forward.

    Returns:
        Sums of shape (C,); the gradients of weight and bias in the weight's.

    >>> import torch
    >>> shard = torch.tensor([[1.0], [3.0]])
    >>> shard_gradient_sums(torch.ones(2, 1), shard, shard_statistics(shard)).total
    tensor([2.], dtype=torch.float64)
    """
    view = BatchView.of(shard, channel_axis=channel_axis)
    view.check_grad_output(grad_output)
    by = merged_statistics(view, batch, eps=eps, mask=mask)
    front, _ = view.affine(weight, None)
    affine_shape = tuple(by.center.shape if front is None else front.shape)
    sums = gradient_sums(grad_output, shard, front, by, affine_shape=affine_shape)
    own_shape = (view.num_features,) if weight is None else weight.shape
    of_affine = (term.view(own_shape) for term in (sums.weight, sums.bias))
    return GradientSums(sums.total.flatten(), sums.dot.flatten(), *of_affine)


def shard_gradient(
    grad_output: Tensor,
    shard: Tensor,
    batch: Moments,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    total: Tensor,
    dot: Tensor,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> Tensor:
    """The gradient of one shard's input, by the sums of all shards.

    dx = s (a - total / count - xh dot / count), a = weight dy, s = (var + eps)^-1/2, xh = (x - mean) s

    Args:
        grad_output: gradient of the shard's output.
        shard: (n, C, *).
        batch: moments of all shards, merged.
        weight: (C,), or (n, C) or the shard's shape for those of each sample or value.
        mask: that of the forward.
        total: (C,), that of `shard_gradient_sums` summed over all shards.
        dot: (C,), the same.
        eps: that of the forward.
        channel_axis: that of the forward.

    Returns:
        A new tensor of the shard's shape and datatype.

    >>> import torch
    >>> shard, grad = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
    >>> sums = shard_gradient_sums(grad, shard, shard_statistics(shard))
    >>> shard_gradient(grad, shard, shard_statistics(shard), total=sums.total, dot=sums.dot)
    tensor([[0.],
            [0.]])
    """
    view = BatchView.of(shard, channel_axis=channel_axis)
    view.check_grad_output(grad_output)
    front, _ = view.affine(weight, None)
    sums = GradientSums(view.in_front(total), view.in_front(dot), total, total)
    return input_gradient(grad_output, shard, front, merged_statistics(view, batch, eps=eps, mask=mask), sums)


def merged_statistics(view: BatchView, batch: Moments, *, eps: float, mask: Tensor | None = None) -> Statistics:
    """What a shard is standardized with, by the moments of the whole batch."""
    check_eps("eps", eps, is_zero_allowed=False)
    if batch.count.shape != (view.num_features,):
        expected, received = f"{view.num_features} channels, as the shard has", f"{batch.count.numel()} channels"
        raise ShapeError("batch", expected=expected, received=received)
    if bool((batch.count < 2).any()):
        expected = "more than 1 value per channel when training"
        raise StatisticsError("batch", expected=expected, received=f"{int(batch.count.min())}")
    mean, var, count = (view.in_front(term) for term in (batch.mean, batch.var(), batch.count))
    table = Statistics.table_of(mean, torch.zeros_like(mean), var, invstd_of(var, eps=eps))
    return Statistics(table, eps, view.axes, count, view.mask(mask))
