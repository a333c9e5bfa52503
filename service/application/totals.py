"""What a statistics resource has stored: written and read, and seen in each of the definitions."""

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
import torch
from safetensors import numpy as safetensors

from normcore.errors import StatisticsError
from normcore.statistics import Histogram, MeanVar, PopulationStatistics
from service.engine.protocol import Tensor
from service.engine.tensors import from_torch, to_torch
from service.storage.statistics import StatisticsRecord, Stored

DEFINITIONS = ("pooled", "pooled_unbiased", "paper", "ema", "ema_debiased")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A resource at one moment: values per channel, and mean and variance by definition, None where it has none.

    `explanation` says how these differ.
    """

    record: StatisticsRecord
    count: Tensor
    definitions: dict[str, dict[str, Tensor] | None]
    explanation: str


@dataclass(frozen=True, slots=True)
class Running:
    """Mean and variance per channel, float64, as inference takes them."""

    mean: Tensor
    var: Tensor


def encode(population: PopulationStatistics, histogram: Histogram) -> bytes:
    tensors = population.to_tensors() | histogram.to_tensors()
    return safetensors.save({name: from_torch(tensor) for name, tensor in tensors.items()})


def decode(state: bytes) -> PopulationStatistics:
    return PopulationStatistics.from_tensors(_tensors(state))


def histogram_of(stored: Stored) -> Histogram:
    return Histogram.from_tensors(_tensors(stored.state))


def _tensors(state: bytes) -> dict[str, torch.Tensor]:
    return {name: to_torch(array) for name, array in safetensors.load(state).items()}


def snapshot(stored: Stored) -> Snapshot:
    population = decode(stored.state)
    pooled = population.pooled
    found: dict[str, dict[str, Any] | None] = {
        "pooled": {"mean": pooled.mean, "var_biased": pooled.var_biased, "var_unbiased": pooled.var_unbiased}
    }
    for name in ("paper", "ema", "ema_debiased"):
        definition = getattr(population, name)
        found[name] = None if definition is None else {"mean": definition.mean, "var": definition.var}
    arrays = {
        name: None if values is None else {key: from_torch(tensor) for key, tensor in values.items()}
        for name, values in found.items()
    }
    return Snapshot(stored.record, from_torch(population.pooled_moments.count), arrays, population.explanation)


def running_of(stored: Stored, definition: str) -> Running:
    population = decode(stored.state)
    if definition.startswith("pooled"):
        pooled = population.pooled
        mean, var = pooled.mean, pooled.var_unbiased if definition == "pooled_unbiased" else pooled.var_biased
    else:
        found: MeanVar | None = getattr(population, definition)
        if found is None:
            expected = "pooled, pooled_unbiased or paper, for merged statistics have no ema"
            raise StatisticsError("definition", expected=expected, received=definition)
        mean, var = found.mean, found.var
    lacking = int((~(mean.isfinite() & var.isfinite())).sum())
    if lacking:
        received = f"none in {lacking} of {mean.numel()}: too few values, or some that are not finite"
        raise StatisticsError("statistics", expected=f"mean and variance ({definition}) per channel", received=received)
    return Running(from_torch(mean), from_torch(var))


def count_of(counts: Tensor) -> int | list[int]:
    """Values per channel: one number where they agree, as they do unless counts or masks differ by channel."""
    numbers: list[int] = counts.astype("int64").tolist()
    return numbers[0] if len(set(numbers)) == 1 else numbers


def content_hash(stored: Stored) -> str:
    """Of everything that decides what the frozen statistics compute."""
    record = stored.record
    meaning = {
        "num_features": record.num_features,
        "channel_axis": record.channel_axis,
        "momentum": record.momentum,
        "convention": record.convention,
    }
    return hashlib.sha256(orjson.dumps(meaning, option=orjson.OPT_SORT_KEYS) + stored.state).hexdigest()
