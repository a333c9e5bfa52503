"""The exponential or cumulative average over batches, kept so that what it started from can be divided out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normcore.errors import StatisticsError
from normcore.statistics.moments import Moments
from normcore.statistics.named_tensors import per_channel_named, tensor_named
from normcore.statistics.running import Momentum, check_momentum, convention_named


@dataclass(frozen=True, slots=True)
class BatchAverage:
    """Weighted sums over batches of mean and variance per channel; float64 tensors of shape (C,).

    With f the weight of a new batch, every update is s <- (1 - f) s + f b from s = 0, and W <- (1 - f) W + f, so that
    W = 1 - (1 - f)^k after k batches. The average that started from mean 0 and variance 1, as frameworks keep it, is
    s + (1 - W) (0, 1); the one without that start is s / W (Kingma and Ba 2015, section 3; Caffe's scale blob).

    Attributes:
        momentum: in the convention's sense; None for the cumulative average, f = 1 / k.
        convention: torch, onnx or keras.
        mean: the sum of batch means.
        var: the sum of batch variances, with the convention's correction.
        weight: W.
    """

    momentum: float | None
    convention: str
    mean: Tensor
    var: Tensor
    weight: Tensor

    @classmethod
    def start(cls, num_features: int, *, momentum: Momentum, convention: str) -> "BatchAverage":
        """Before any batch.

        Raises:
            ParameterError: an unknown convention, or a momentum outside [0, 1].
        """
        value = convention_named(convention).momentum if momentum == "default" else momentum
        check_momentum(value, convention=convention)
        zero = torch.zeros(num_features, dtype=torch.float64)
        return cls(value, convention, zero, zero, zero)

    def update(self, batch: Moments, *, batches: Tensor) -> "BatchAverage":
        """After one more batch; unchanged in channels with fewer than two values.

        Args:
            batch: its moments.
            batches: how many are in the average with this one, per channel.
        """
        rule = convention_named(self.convention)
        is_updated = batch.count > 1
        new = 1.0 / batches.clamp_min(1.0) if self.momentum is None else rule.weight_of_new(self.momentum)

        def averaged(kept: Tensor, value: Tensor) -> Tensor:
            return torch.where(is_updated, kept * (1.0 - new) + value * new, kept)

        mean, var = averaged(self.mean, batch.mean), averaged(self.var, batch.var(correction=rule.correction))
        weight = averaged(self.weight, torch.ones_like(self.weight))
        return BatchAverage(self.momentum, self.convention, mean, var, weight)

    def to_tensors(self) -> dict[str, Tensor]:
        """Named float64 and int64 tensors; the convention as the bytes of its name, momentum None as NaN."""
        return {
            "average.momentum": torch.tensor(math.nan if self.momentum is None else self.momentum, dtype=torch.float64),
            "average.convention": torch.tensor(list(self.convention.encode()), dtype=torch.int64),
            "average.mean": self.mean,
            "average.var": self.var,
            "average.weight": self.weight,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, num_features: int) -> "BatchAverage | None":
        """What `to_tensors` wrote; None where none of it is there.

        Raises:
            StatisticsError: a tensor is missing.
            DtypeError, ShapeError: one of another datatype or shape.
            ParameterError: an unknown convention, or a momentum outside [0, 1].
        """
        if not any(name.startswith("average.") for name in tensors):
            return None
        momentum, letters = (tensor_named(tensors, f"average.{name}") for name in ("momentum", "convention"))
        if momentum.numel() != 1 or letters.ndim != 1 or letters.dtype != torch.int64:
            expected = "a single momentum, and int64 bytes of a convention's name"
            received = f"shapes {tuple(momentum.shape)} and {tuple(letters.shape)}"
            raise StatisticsError("average", expected=expected, received=received)
        convention = "".join(chr(letter % 128) for letter in letters.tolist())
        value = None if bool(momentum.isnan()) else float(momentum)
        check_momentum(value, convention=convention)
        mean, var, weight = (
            per_channel_named(tensors, f"average.{name}", num_features=num_features)
            for name in ("mean", "var", "weight")
        )
        return cls(value, convention, mean, var, weight)
