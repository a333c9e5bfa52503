"""The JSON documents of statistics resources, and their text: numbers that are not finite are strings."""

from dataclasses import asdict
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field

from normcore.statistics import CONVENTIONS, Bins
from service.api.schemas import Request
from service.application.statistics import NewStatistics
from service.application.totals import Snapshot, count_of
from service.codecs.json_tensors import to_json
from service.engine.protocol import Tensor
from service.engine.tensors import from_torch
from service.storage.statistics import StatisticsRecord

Vector = list[float | Literal["NaN", "Infinity", "-Infinity"]]


class StatisticsRequest(Request):
    """What to collect."""

    num_features: int = Field(ge=1, description="Channels; at most NORMSERVE_MAX_NUM_FEATURES.")
    name: str | None = Field(None, description="For people; need not be unique. null: none.")
    channel_axis: int = Field(1, ge=-64, le=63, description="Axis of the channels in posted tensors.")
    momentum: float | None = Field(
        CONVENTIONS["torch"].momentum,
        ge=0,
        le=1,
        description="Of the ema, in the convention's sense: torch, weight of the new batch (0.1 where not given); onnx "
        "and keras, weight of the kept value (0.9 and 0.99 where not given). null: cumulative average over batches.",
    )
    convention: Literal["torch", "onnx", "keras"] = Field(
        "torch", description="Whose ema: torch averages Bessel's variance of a batch, onnx and keras the biased one."
    )

    def wanted(self) -> NewStatistics:
        return NewStatistics(
            num_features=self.num_features,
            name=self.name,
            channel_axis=self.channel_axis,
            momentum=self.momentum if "momentum" in self.model_fields_set else "default",
            convention=self.convention,
        )


class MergeRequest(Request):
    """What to merge."""

    ids: list[str] = Field(min_length=1, description="Resources of the same channels and convention, each once.")
    name: str | None = Field(None, description="Name of the new resource; null: none.")


class Nothing(Request):
    """A body that may be an empty object, or absent."""


class StatisticsSummary(BaseModel):
    """A statistics resource without its numbers."""

    id: str
    name: str | None
    num_features: int
    channel_axis: int
    momentum: float | None
    convention: str
    created_at: str
    frozen: bool
    sequence: int = Field(description="Posts that were counted.")
    batches: int = Field(description="Batches with values, those of merged resources included.")
    content_hash: str | None = Field(description="SHA-256 of what is frozen; none while it is open.")
    sources: list[str] = Field(description="What it was frozen or merged from.")

    @classmethod
    def of(cls, record: StatisticsRecord) -> "StatisticsSummary":
        return cls.model_validate(asdict(record) | {"frozen": record.is_frozen})


class StatisticsList(BaseModel):
    """All statistics resources, oldest first."""

    statistics: list[StatisticsSummary]


class Pooled(BaseModel):
    """Of all values together, each counting once."""

    mean: Vector
    var_biased: Vector
    var_unbiased: Vector


class MeanVar(BaseModel):
    """Mean and variance per channel."""

    mean: Vector
    var: Vector


class Definitions(BaseModel):
    """The same data in four definitions; "NaN" where a channel has too few values."""

    pooled: Pooled
    paper: MeanVar = Field(description="Averages over batches of batch mean and unbiased batch variance.")
    ema: MeanVar | None = Field(description="From mean 0, variance 1, as a layer in training; null after a merge.")
    ema_debiased: MeanVar | None = Field(description="The ema without what it started from; null after a merge.")


class Statistics(StatisticsSummary):
    """A statistics resource."""

    count: int | list[int] = Field(description="Values per channel; a list where the channels differ.")
    statistics: Definitions
    explanation: str = Field(description="How the definitions differ in these numbers, and whether that matters.")


class Posted(BaseModel):
    """The answer to a batch."""

    statistics: str = Field(description="Id of the resource.")
    sequence: int = Field(description="Number of this batch among those counted.")
    counted: bool = Field(description="False for a batch without values, and for one that nan_policy skips.")
    count: int | list[int] = Field(description="Values per channel so far.")
    batches: int


class HistogramAnswer(BaseModel):
    """Counts in bins of equal width between the smallest and the largest value."""

    channel: int | None = Field(description="Null for all channels together.")
    edges: list[float] = Field(description="One more than bins.")
    counts: list[float] = Field(
        description="Values per bin; fractions where an edge cuts one of the cells they are in."
    )
    density: list[float] = Field(description="Counts scaled to an area of 1.")
    error: float = Field(description="What the share of values below any edge may be off by.")
    non_finite: int = Field(description="Values that are NaN or infinite, which no bin counts.")

    @classmethod
    def of(cls, bins: Bins, *, channel: int | None) -> "HistogramAnswer":
        edges, counts, density = (from_torch(tensor).tolist() for tensor in (bins.edges, bins.counts, bins.density))
        return cls(
            channel=channel,
            edges=edges,
            counts=counts,
            density=density,
            error=bins.error,
            non_finite=bins.non_finite,
        )


def document(snapshot: Snapshot) -> bytes:
    """The text of `Statistics`."""
    definitions = {
        name: None if values is None else {key: _vector(array) for key, array in values.items()}
        for name, values in snapshot.definitions.items()
    }
    content: dict[str, Any] = StatisticsSummary.of(snapshot.record).model_dump()
    content |= {"count": count_of(snapshot.count), "statistics": definitions}
    content["explanation"] = snapshot.explanation
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _vector(array: Tensor) -> Any:
    return to_json(array, are_tokens_bare=False)
