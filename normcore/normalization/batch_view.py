"""How batch norm and its kin see their operands: checked, and shaped so that they broadcast against the input."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from normcore._checks import (
    check_axis,
    check_batch_count,
    check_floating,
    check_mask,
    check_per_channel,
    check_rank,
    check_shape,
    check_variance,
)
from normcore._precision import accumulation_dtype
from normcore.errors import ShapeError, StatisticsError
from normcore.normalization.gradients import Gradients, Seen, Statistics, standardize_gradients
from normcore.statistics.moments import Moments
from normcore.statistics.running import RunningStatistics

# Parts of a batch that are computed one after another: each costs its time however few values it has.
MAX_PARTS = 4096


@dataclass(frozen=True, slots=True)
class BatchView:
    """An input of channels along one axis, counted from the front."""

    input: Tensor
    channel_axis: int

    @classmethod
    def of(cls, input: Tensor, *, channel_axis: int) -> "BatchView":
        check_floating("input", input)
        check_rank("input", input, minimum=2)
        return cls(input, check_axis("channel_axis", channel_axis, rank=input.ndim))

    @property
    def num_features(self) -> int:
        return self.input.shape[self.channel_axis]

    @property
    def axes(self) -> tuple[int, ...]:
        """Those that statistics are taken over."""
        return _others(self.input.ndim, self.channel_axis)

    def in_front(self, tensor: Tensor) -> Tensor:
        """(C,), (N, C) or the input's shape in front of the input."""
        if tensor.ndim == 1 and self.channel_axis == self.input.ndim - 1:
            return tensor
        return tensor.view(self._front(tensor.shape))

    def affine(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, checked, in front of the input."""
        self.check_affine(weight, bias)
        front = None if weight is None else self.in_front(weight)
        return front, None if bias is None else self.in_front(bias)

    def check_affine(self, weight: Tensor | None, bias: Tensor | None) -> Seen:
        """Weight and bias are both (C,), (N, C) for one per sample, or of the input's shape; how they are seen.

        Raises:
            DtypeError: a tensor that is not floating.
            ShapeError: another shape, or two shapes.
        """
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if tensor.ndim > 2 or tensor.shape == self.input.shape:
                check_shape(name, tensor, self.input.shape, meaning="one value for each of the input")
            elif tensor.ndim < 2 or self.channel_axis == 0:
                check_per_channel(name, tensor, num_features=self.num_features)
            else:
                shape = (self.input.shape[0], self.num_features)
                check_shape(name, tensor, shape, meaning="one value per sample and channel of the input")
        if weight is not None and bias is not None and weight.shape != bias.shape:
            expected = f"the weight's shape {tuple(weight.shape)}"
            raise ShapeError("bias", expected=expected, received=f"shape {tuple(bias.shape)}")
        given = bias if weight is None else weight
        front = self._front((self.num_features,))
        return Seen(None, front if given is None or given.ndim == 1 else self._front(given.shape), front)

    def _front(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape == self.input.shape:
            return shape
        return _with_ones(self.input.shape, self.channel_axis, is_per_sample=len(shape) == 2)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask of the input's shape without the channel axis, in front of the input.

        Raises:
            DtypeError: a mask that is not bool.
            ShapeError: one that does not broadcast to that shape.
        """
        if mask is None:
            return None
        shape = tuple(size for axis, size in enumerate(self.input.shape) if axis != self.channel_axis)
        check_mask("mask", mask, shape, meaning="the input's without the channel axis")
        return mask.expand(shape).unsqueeze(self.channel_axis)

    def check_grad_output(self, grad_output: Tensor | None) -> None:
        if grad_output is not None:
            check_shape("grad_output", grad_output, self.input.shape, meaning="that of the input")

    def running(
        self,
        mean: Tensor | None,
        var: Tensor | None,
        num_batches_tracked: Tensor | None,
        *,
        allow_negative_var: bool = False,
    ) -> RunningStatistics | None:
        """Running statistics that fit the channels, without gradient; None where there are none."""
        if mean is None and var is None:
            return None
        if mean is None or var is None:
            missing, present = ("running_mean", "running_var") if mean is None else ("running_var", "running_mean")
            raise StatisticsError(missing, expected=f"to be given together with {present}", received="none")
        check_per_channel("running_mean", mean, num_features=self.num_features)
        check_per_channel("running_var", var, num_features=self.num_features)
        if not allow_negative_var:
            check_variance("running_var", var)
        if num_batches_tracked is not None:
            check_batch_count("num_batches_tracked", num_batches_tracked)
            num_batches_tracked = num_batches_tracked.to(torch.int64).reshape(())
        # A view costs as much as all checks of a few channels.
        mean, var = (term.detach() if term.requires_grad else term for term in (mean, var))
        return RunningStatistics(mean, var, num_batches_tracked)

    def counted(self, mask: Tensor | None) -> int:
        """Values per channel in training: two or more, or none for an empty input.

        Raises:
            StatisticsError: one value per channel, or a mask that leaves fewer than two.
        """
        count = self.input.numel() // max(1, self.num_features)
        if count == 1:
            expected = "more than 1 value per channel when training"
            raise StatisticsError("input", expected=expected, received=f"shape {tuple(self.input.shape)}")
        if mask is not None and count:
            count = int(mask.sum())
            if count < 2:
                expected = "more than 1 counted value per channel when training"
                raise StatisticsError("mask", expected=expected, received=f"{count}")
        return count

    def moments(self, statistics: Statistics) -> Moments:
        """Moments of the batch that its statistics come from."""
        mean = statistics.mean.flatten()
        count = torch.as_tensor(statistics.count, dtype=torch.float64, device=mean.device).expand_as(statistics.mean)
        return Moments(count.flatten(), mean, statistics.var.flatten() * count.flatten())

    def gradients(
        self, grad_output: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics
    ) -> Gradients:
        """Those of weight and bias in their own shape, (C,) where neither is given."""
        given = weight if weight is not None else bias
        own_shape = (self.num_features,) if given is None else tuple(given.shape)
        seen = Seen(None, self._front(own_shape))
        terms = grad_output, self.input, weight, statistics
        return standardize_gradients(*terms, affine_shape=own_shape, seen=seen)

    def empty_gradients(self, weight: Tensor | None) -> Gradients:
        """Those of an input without values."""
        shape = (self.num_features,) if weight is None else weight.shape
        nothing = torch.zeros(shape, dtype=accumulation_dtype(self.input.dtype), device=self.input.device)
        return Gradients(torch.zeros_like(self.input), nothing, nothing.clone())


@lru_cache(64)
def _others(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(rank) if other != axis)


@lru_cache(1024)
def _with_ones(shape: tuple[int, ...], channel_axis: int, *, is_per_sample: bool) -> tuple[int, ...]:
    varying = (0, channel_axis) if is_per_sample else (channel_axis,)
    return tuple(size if axis in varying else 1 for axis, size in enumerate(shape))
