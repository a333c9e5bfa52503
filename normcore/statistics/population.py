"""Population statistics from batches, in four definitions side by side."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._checks import check_batch_count
from normcore.errors import ParameterError, ShapeError, StatisticsError
from normcore.statistics.average import BatchAverage
from normcore.statistics.moments import Moments
from normcore.statistics.named_tensors import per_channel_named, tensor_named
from normcore.statistics.running import Momentum

NAN_POLICIES = ("propagate", "raise", "skip_update")
# A standard deviation off by more than 2.5 % is worth a word.
_LARGE_DIFFERENCE = 0.05
_MOMENTS = ("count", "mean", "m2", "mean_low", "m2_low")


@dataclass(frozen=True, slots=True)
class MeanVar:
    """Mean and variance per channel; float64 of shape (C,), NaN where there is nothing to tell them from."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True, slots=True)
class PooledMeanVar:
    """Mean and both variances, m2 / n and m2 / (n - 1), per channel; NaN as in `MeanVar`."""

    mean: Tensor
    var_biased: Tensor
    var_unbiased: Tensor


@dataclass(frozen=True, slots=True)
class PopulationStatistics:
    """What all batches so far say of the population; immutable, O(C) numbers whatever the data.

    With n_i, mean_i, m2_i of batch i and k batches:

    - pooled: mean and variance of all values together, by Chan's merge.
    - paper: sum(mean_i) / k and sum(m2_i / (n_i - 1)) / k (Ioffe and Szegedy 2015, algorithm 2, with equal n_i; torch
      with momentum None, `torch.optim.swa_utils.update_bn`).
    - ema: r <- (1 - f) r + f b from mean 0 and variance 1, as a layer in training keeps it in the convention named.
    - ema_debiased: ema without that start, divided by 1 - (1 - f)^k.

    A batch with one value in a channel has no variance to tell of: there it enters pooled only. An empty one changes
    nothing. In channels that a mask leaves without values nothing changes either.

    Attributes:
        pooled_moments: of all values.
        batch_means: of the batch means, each counting once.
        batch_vars: of the unbiased batch variances, each counting once.
        m2_within: sum(m2_i).
        batches: batches with any value.
        average: what the ema are taken from; None in a merged state, for there is no order of its batches.

    >>> statistics = PopulationStatistics.start(1, momentum=0.5)
    >>> for batch in ([[0.0], [2.0]], [[4.0], [6.0]]):
    ...     statistics = statistics.update(Moments.of(torch.tensor(batch)))
    >>> statistics.pooled.var_biased, statistics.paper.var
    (tensor([5.], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    >>> statistics.ema
    MeanVar(mean=tensor([2.7500], dtype=torch.float64), var=tensor([1.7500], dtype=torch.float64))
    """

    pooled_moments: Moments
    batch_means: Moments
    batch_vars: Moments
    m2_within: Tensor
    batches: int
    average: BatchAverage | None

    @classmethod
    def start(
        cls, num_features: int, *, momentum: Momentum = "default", convention: str = "torch"
    ) -> "PopulationStatistics":
        """The state before any batch.

        Args:
            num_features: C.
            momentum: in the convention's sense, its default where not given; None for the cumulative average.
            convention: torch, onnx or keras.

        Raises:
            ParameterError: num_features < 1, an unknown convention, a momentum outside [0, 1].
        """
        if type(num_features) is not int or num_features < 1:
            raise ParameterError("num_features", expected="an integer >= 1", received=repr(num_features))
        nothing = Moments.none(num_features)
        average = BatchAverage.start(num_features, momentum=momentum, convention=convention)
        return cls(nothing, nothing, nothing, nothing.m2, 0, average)

    @property
    def num_features(self) -> int:
        return self.m2_within.numel()

    def update(self, batch: Moments, *, nan_policy: str = "raise") -> "PopulationStatistics":
        """The state after one more batch.

        Args:
            batch: its moments, C channels.
            nan_policy: for a batch whose mean or variance is not finite in some channel, or makes the pooled ones
                overflow. raise: refuse it; propagate: its channels are NaN or infinite from then on, in every
                definition; skip_update: it changes nothing.

        Returns:
            A new state, or this one itself where nothing changes.

        Raises:
            ShapeError: another number of channels.
            ParameterError: an unknown nan_policy.
            StatisticsError: a batch that is not finite, with nan_policy raise.
        """
        if batch.count.numel() != self.num_features:
            expected, received = f"{self.num_features} channels", f"{batch.count.numel()} channels"
            raise ShapeError("batch", expected=expected, received=received)
        if nan_policy not in NAN_POLICIES:
            raise ParameterError("nan_policy", expected=f"one of {', '.join(NAN_POLICIES)}", received=repr(nan_policy))
        if not bool((batch.count > 0).any()):
            return self
        updated = self._updated(batch)
        is_spoiled = self._spoiled_by(batch, updated)
        if nan_policy == "propagate" or not bool(is_spoiled.any()):
            return updated
        if nan_policy == "raise":
            expected = "finite values, whose squares float64 holds (nan_policy raise)"
            raise StatisticsError(
                "batch",
                expected=expected,
                received=f"NaN, infinity or an overflow in channel {int(is_spoiled.to(torch.int8).argmax())}",
            )
        return self

    def _spoiled_by(self, batch: Moments, updated: "PopulationStatistics") -> Tensor:
        # A finite mean may be so far from the others' that its squared distance overflows.
        was_finite, is_finite = (
            state.pooled_moments.mean.isfinite() & state.pooled_moments.m2.isfinite() for state in (self, updated)
        )
        is_batch_finite = batch.mean.isfinite() & batch.m2.isfinite()
        return (batch.count > 0) & ~(is_batch_finite & (is_finite | ~was_finite))

    def _updated(self, batch: Moments) -> "PopulationStatistics":
        is_averaged = (batch.count > 1).double()
        zero = torch.zeros_like(is_averaged)
        batch_var = batch.var(correction=1)
        means = self.batch_means.merge(Moments(is_averaged, batch.mean, zero, batch.mean_low))
        variances = self.batch_vars.merge(Moments(is_averaged, batch_var, zero))
        return PopulationStatistics(
            self.pooled_moments.merge(batch),
            means,
            variances,
            self.m2_within + batch.m2.where(batch.count > 0, zero),
            self.batches + 1,
            None if self.average is None else self.average.update(batch, batches=means.count),
        )

    def merge(self, *others: "PopulationStatistics") -> "PopulationStatistics":
        """The state of all batches of all parts; no ema. A batch that is in two parts is in the result twice.

        Raises:
            ShapeError: the numbers of channels differ.
        """
        parts = (self, *others)
        return PopulationStatistics(
            self.pooled_moments.merge(*(other.pooled_moments for other in others)),
            self.batch_means.merge(*(other.batch_means for other in others)),
            self.batch_vars.merge(*(other.batch_vars for other in others)),
            torch.stack([part.m2_within for part in parts]).sum(0),
            sum(part.batches for part in parts),
            None,
        )

    @property
    def pooled(self) -> PooledMeanVar:
        """Of all values together, each counting once."""
        moments = self.pooled_moments
        mean = moments.mean.masked_fill(moments.count == 0, torch.nan)
        return PooledMeanVar(mean, moments.var(), moments.var(correction=1))

    @property
    def paper(self) -> MeanVar:
        """Of batches, each counting once: the plain averages of batch mean and unbiased batch variance."""
        is_empty = self.batch_means.count == 0
        mean, var = (moments.mean.masked_fill(is_empty, torch.nan) for moments in (self.batch_means, self.batch_vars))
        return MeanVar(mean, var)

    @property
    def ema(self) -> MeanVar | None:
        """As a layer that started from mean 0 and variance 1 keeps them; None in a merged state."""
        if self.average is None:
            return None
        return MeanVar(self.average.mean, self.average.var + (1.0 - self.average.weight))

    @property
    def ema_debiased(self) -> MeanVar | None:
        """The ema without the mean 0 and variance 1 it started from; None in a merged state."""
        if self.average is None:
            return None
        weight = self.average.weight.masked_fill(self.average.weight == 0, torch.nan)
        return MeanVar(self.average.mean / weight, self.average.var / weight)

    @property
    def explanation(self) -> str:
        """How the definitions differ in these numbers, and when that matters.

        pooled var_biased = sum(m2_i) / n + sum(n_i (mean_i - mean)^2) / n: the mean of the biased batch variances and
        the variance of the batch means, batches weighted by their size.
        """
        if not self.batches:
            return "No batch is counted yet: there is nothing to compare."
        count = self.pooled_moments.count.clamp_min(1.0)
        within, pooled = self.m2_within / count, self.pooled_moments.m2 / count
        between = (pooled - within).clamp_min(0.0)
        unbiased, paper = self.pooled.var_unbiased, self.paper.var
        # NaN where a definition has nothing to tell yet, which is no difference.
        differences = ((unbiased - paper).abs() / unbiased).nan_to_num(nan=0.0)
        channel = int(differences.argmax())
        noun = "batch" if self.batches == 1 else "batches"
        sizes = (
            "pooled variance = mean of batch variances + variance of batch means; "
            f"here, over {self.batches} {noun} and averaged over channels, "
            f"{float(pooled.mean()):.6g} = {float(within.mean()):.6g} + {float(between.mean()):.6g}."
        )
        difference = float(differences[channel])
        if difference <= _LARGE_DIFFERENCE:
            cause = "The batches are alike" if self.batches > 1 else "There is no other batch"
            return f"{sizes} {cause}: pooled and paper variance differ by {difference:.2%}."
        return (
            f"{sizes} paper and ema leave the second part out, which matters here: in channel {channel} "
            f"the unbiased variance is {float(unbiased[channel]):.6g} pooled and {float(paper[channel]):.6g} by paper. "
            "For data as a whole, pooled is right."
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The whole state as named float64 and int64 tensors, without loss; `from_tensors` reads them."""
        tensors = {"batches": torch.tensor(self.batches), "m2_within": self.m2_within}
        for name in ("pooled_moments", "batch_means", "batch_vars"):
            moments: Moments = getattr(self, name)
            zero = torch.zeros_like(moments.mean)
            parts = (getattr(moments, part) for part in _MOMENTS)
            named = zip(_MOMENTS, parts, strict=True)
            tensors |= {f"{name}.{part}": zero if tensor is None else tensor for part, tensor in named}
        return tensors if self.average is None else tensors | self.average.to_tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "PopulationStatistics":
        """The state that `to_tensors` wrote.

        Raises:
            StatisticsError: a tensor is missing or impossible.
            DtypeError, ShapeError: one of another datatype or shape.
        """
        num_features = tensor_named(tensors, "m2_within").numel()
        pooled, means, variances = (
            Moments(*(per_channel_named(tensors, f"{name}.{part}", num_features=num_features) for part in _MOMENTS))
            for name in ("pooled_moments", "batch_means", "batch_vars")
        )
        batches = tensor_named(tensors, "batches")
        check_batch_count("batches", batches)
        within = per_channel_named(tensors, "m2_within", num_features=num_features)
        average = BatchAverage.from_tensors(tensors, num_features=num_features)
        return cls(pooled, means, variances, within, int(batches), average)
