"""Batch norm of a batch in shards, as workers compute it together, in one process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype
from normcore.errors import ParameterError, ShapeError
from normcore.normalization.batch_norm import BATCH_NORM, TRAINING_PARAMETERS, normalize_batch
from normcore.normalization.batch_options import BatchOptions
from normcore.normalization.batch_result import BatchNormResult
from normcore.normalization.batch_view import BatchView
from normcore.normalization.gradients import Gradients, Standardized, differentiable
from normcore.normalization.method import Method, TensorArgument
from normcore.normalization.shards import check_masks, check_shards, check_sizes
from normcore.normalization.synchronized import (
    merged_statistics,
    shard_gradient,
    shard_gradient_sums,
    shard_statistics,
    standardize_shard,
)
from normcore.statistics.moments import Moments
from normcore.statistics.running import Momentum


@dataclass(frozen=True)
class SynchronizedBatchNormResult(BatchNormResult):
    """Outputs of batch norm of all shards together, joined along axis 0.

    Attributes:
        shard_sizes: samples of each shard.
    """

    shard_sizes: tuple[int, ...] = ()

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The output of each shard."""
        return _split(self.output, self.shard_sizes)

    @property
    def grad_inputs(self) -> tuple[Tensor, ...] | None:
        """The gradient of each shard's input, where gradients of the outputs were given."""
        return None if self.grad_input is None else _split(self.grad_input, self.shard_sizes)


def synchronized_batch_norm(
    shards: Sequence[Tensor],
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    grad_outputs: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: Momentum = "default",
    eps: float = 1e-5,
    convention: str = "torch",
    channel_axis: int = 1,
    nan_policy: str = "propagate",
) -> SynchronizedBatchNormResult:
    """Batch norm of all shards together: what `batch_norm` gives for their concatenation.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var over all shards

    Every shard is summed and normalized by itself, with the functions of `normcore.normalization.synchronized`, which
    is what workers of a distributed training call. Counts weigh the shards, which may be of any sizes, and empty.
    Everything else is as in `batch_norm`, precision and derivatives too.

    Args:
        shards: one or more of (n, C, *), the samples along axis 0, alike in all but their number.
        running_mean: (C,).
        running_var: (C,).
        weight: (C,), or (N, C) for weights of each sample of all shards.
        bias: the weight's shape.
        grad_outputs: gradient of each shard's output.
        masks: bool for each shard, true where a position counts in the statistics; broadcasts to the shard's shape
            without the channel axis.
        num_batches_tracked: batches so far, a single value.
        training: whether the statistics are the batch's own.
        momentum: as in `batch_norm`.
        eps: > 0 in training, >= 0 in inference.
        convention: torch, onnx or keras.
        channel_axis: axis of the channels, from the back where negative; not that of the samples.
        nan_policy: propagate, raise or skip_update, as in `batch_norm`.

    Returns:
        Output joined over the shards and per shard, statistics, updated running statistics, gradients; those of weight
        and bias are of all shards together.

    Raises:
        ParameterError: channels along axis 0, or what `batch_norm` refuses.
        ShapeError: no shards, shards that differ in more than their number of samples, or what `batch_norm` refuses.
        DtypeError: shards of different datatypes, or what `batch_norm` refuses.
        StatisticsError: as `batch_norm`.

    >>> import torch
    >>> shards = [torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0]])]
    >>> result = synchronized_batch_norm(shards, training=True)
    >>> result.outputs[0], result.var
    (tensor([[-1.2247]]), tensor([0.6667]))
    """
    sizes = check_shards("shards", shards)
    if grad_outputs is not None and check_shards("grad_outputs", grad_outputs) != sizes:
        received = ", ".join(str(len(grad)) for grad in grad_outputs)
        raise ShapeError("grad_outputs", expected=f"the samples of the shards, {sizes}", received=received)
    joined = BatchView.of(torch.cat(list(shards)), channel_axis=channel_axis)
    if joined.channel_axis == 0:
        raise ParameterError("channel_axis", expected="another axis than that of the samples, 0", received="0")
    options = BatchOptions(training, eps, nan_policy, momentum, convention)
    running = joined.running(running_mean, running_var, num_batches_tracked)
    own_masks = check_masks(masks, shards, channel_axis=joined.channel_axis)
    mask = None if masks is None else torch.cat([own for own in own_masks if own is not None])
    counted = joined.mask(mask)
    if not training or joined.counted(counted) == 0:
        grad_output = None if grad_outputs is None else torch.cat(list(grad_outputs))
        joined.check_grad_output(grad_output)
        whole = normalize_batch(joined, weight, bias, running, options, grad_output=grad_output, counted=counted)
        return SynchronizedBatchNormResult.extending(whole, shard_sizes=sizes)
    options.check_values(joined.input, counted)
    affine = joined.affine(weight, bias)
    sharded = _Sharded.of(shards, weight, bias, own_masks, eps=eps, channel_axis=joined.channel_axis)
    found = Standardized(sharded.output(), merged_statistics(joined, sharded.batch, eps=eps, mask=mask))
    batch, updated = sharded.batch, None
    if running is not None:
        updated = options.updated(running, mean=batch.mean, m2=batch.m2, count=batch.count)
    result = BatchNormResult.of(
        differentiable(found, joined.input, *affine),
        joined,
        before=running,
        updated=updated,
        gradients=None if grad_outputs is None else sharded.gradients(grad_outputs),
        nan_policy=nan_policy,
    )
    return SynchronizedBatchNormResult.extending(result, shard_sizes=sizes)


@dataclass(frozen=True, slots=True)
class _Sharded:
    """What the workers of all shards have in common, and the weight, bias and mask of each."""

    shards: Sequence[Tensor]
    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    batch: Moments
    eps: float
    channel_axis: int

    @classmethod
    def of(
        cls,
        shards: Sequence[Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        masks: Sequence[Tensor | None],
        *,
        eps: float,
        channel_axis: int,
    ) -> "_Sharded":
        if weight is None and bias is not None and bias.ndim > 1:
            weight = torch.ones_like(bias)  # its gradient has the bias's shape
        weights, biases = (_of_each(term, shards) for term in (weight, bias))
        first, *others = (
            shard_statistics(shard, mask, channel_axis=channel_axis) for shard, mask in zip(shards, masks, strict=True)
        )
        return cls(shards, weights, biases, masks, first.merge(*others), eps, channel_axis)

    def output(self) -> Tensor:
        outputs = (
            standardize_shard(shard, self.batch, weight, bias, eps=self.eps, channel_axis=self.channel_axis)
            for shard, weight, bias in zip(self.shards, self.weights, self.biases, strict=True)
        )
        return torch.cat(list(outputs))

    def gradients(self, grad_outputs: Sequence[Tensor]) -> Gradients:
        """Sums of every shard, and from those of all the gradient of each."""
        options: dict[str, Any] = {"eps": self.eps, "channel_axis": self.channel_axis}
        operands = list(zip(grad_outputs, self.shards, self.weights, self.masks, strict=True))
        sums = [
            shard_gradient_sums(grad, shard, self.batch, weight, mask, **options)
            for grad, shard, weight, mask in operands
        ]
        total, dot = _sum(own.total for own in sums), _sum(own.dot for own in sums)
        of_inputs = [
            shard_gradient(grad, shard, self.batch, weight, mask, total=total, dot=dot, **options)
            for grad, shard, weight, mask in operands
        ]
        dtype = accumulation_dtype(self.shards[0].dtype)
        is_per_sample = self.weights[0] is not None and self.weights[0].ndim > 1
        join = torch.cat if is_per_sample else _sum
        of_affine = (join([getattr(own, name) for own in sums]).to(dtype) for name in ("weight", "bias"))
        return Gradients(torch.cat(of_inputs), *of_affine)


def _of_each(term: Tensor | None, shards: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """What every shard has of a weight or bias: its own samples of one per sample, else all."""
    if term is None or term.ndim == 1:
        return [term] * len(shards)
    return torch.split(term.detach(), [len(shard) for shard in shards])


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def _split(tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(tensor, list(sizes))


def _of_joined(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shard_sizes: Tensor,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: Momentum = "default",
    eps: float = 1e-5,
    convention: str = "torch",
    channel_axis: int = 1,
    nan_policy: str = "propagate",
) -> SynchronizedBatchNormResult:
    """The method: one tensor, and the sizes to split its axis 0 into."""
    view = BatchView.of(input, channel_axis=channel_axis)
    view.check_grad_output(grad_output)
    sizes = check_sizes(shard_sizes, samples=len(input))
    counted = view.mask(mask)
    return synchronized_batch_norm(
        _split(input, sizes),
        running_mean,
        running_var,
        weight,
        bias,
        grad_outputs=None if grad_output is None else _split(grad_output, sizes),
        masks=None if counted is None else _split(counted.squeeze(view.channel_axis), sizes),
        num_batches_tracked=num_batches_tracked,
        training=training,
        momentum=momentum,
        eps=eps,
        convention=convention,
        channel_axis=channel_axis,
        nan_policy=nan_policy,
    )


_SHARD_SIZES = TensorArgument("shard_sizes", "INT64, samples of each shard; 0 is one", "(S,)", is_required=True)

SYNCHRONIZED_BATCH_NORM = Method(
    name="synchronized_batch_norm",
    summary="Batch norm of shards by the merged statistics of all, as distributed workers compute it.",
    formula="y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var merged from count, mean and m2 of shards",
    source="Chan, Golub and LeVeque 1979 for the merge; torch.nn.SyncBatchNorm",
    tensors=(*BATCH_NORM.tensors, _SHARD_SIZES),
    parameters=TRAINING_PARAMETERS,
    outputs=BATCH_NORM.outputs,
    function=_of_joined,
)
