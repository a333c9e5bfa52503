"""What a recalibration or a look at drift says of itself."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

DriftVerdict = Literal["fresh", "stale", "unknown"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A batch norm whose statistics data cannot replace, and why."""

    normalization: str
    reason: str


@dataclass(frozen=True, slots=True)
class ChannelShift:
    """The statistics of one channel: the frozen ones, those of the data, and how far apart they are.

    Attributes:
        mean_shift: (mean - frozen_mean) / sqrt(frozen_var + eps), in frozen standard deviations.
        log_var_ratio: log((var + eps) / (frozen_var + eps)).
        distance: sqrt(mean_shift^2 + (exp(log_var_ratio / 2) - 1)^2): between normal distributions with these moments,
            the 2-Wasserstein distance in frozen standard deviations; 0 where the frozen statistics hold.
    All three are None where the frozen statistics are no mean and variance (NaN, negative).
    """

    channel: int
    frozen_mean: float | None
    frozen_var: float | None
    mean: float
    var: float
    mean_shift: float | None
    log_var_ratio: float | None
    distance: float | None


@dataclass(frozen=True, slots=True)
class LayerShift:
    """How far the statistics of one batch norm lie from the data's.

    Attributes:
        normalization: name of the node, or its output where it has none.
        count: values per channel in the data.
        depth: batch norms before this one, one after the other.
        distance: root mean square of the channels' distances.
        mean_shift: the largest in magnitude of the channels', with its sign.
        log_var_ratio: the largest in magnitude of the channels', with its sign.
        noise: the distance that as many independent values of an unchanged normal distribution have by chance,
            sqrt(1.5 / count); more where neighbouring values depend on one another.
        worst_channels: the channels furthest off, worst first.
    """

    normalization: str
    num_features: int
    count: int
    depth: int
    distance: float | None
    mean_shift: float | None
    log_var_ratio: float | None
    noise: float
    worst_channels: tuple[ChannelShift, ...]


@dataclass(frozen=True, slots=True)
class RecalibrationReport:
    """What was recomputed, from how much, and how far it moved.

    Attributes:
        layers: the recalibrated batch norms, in the order of the graph.
        kept: the others.
        passes: partial runs of the network over all batches, one per depth.
        batches: batches of data.
    """

    layers: tuple[LayerShift, ...]
    kept: tuple[Kept, ...]
    passes: int
    batches: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"recalibrated": len(self.layers)}


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Whether frozen statistics still fit the data.

    Attributes:
        verdict: `stale` when a layer's distance is over the threshold, `fresh` when all are within, `unknown` when
            there are none or the data are too few to tell.
        sentence: the verdict with its numbers.
    """

    verdict: DriftVerdict
    sentence: str
    threshold: float
    layers: tuple[LayerShift, ...]
    kept: tuple[Kept, ...]
    batches: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


__all__ = ["ChannelShift", "DriftReport", "DriftVerdict", "Kept", "LayerShift", "RecalibrationReport"]
