"""What a statistics resource has stored: written and read, and seen in each of the definitions."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import orjson
import torch
from safetensors import numpy as safetensors

from normcore.errors import StatisticsError
from normcore.statistics import Histogram, MeanVar, PopulationStatistics
from service.application.sample import start
from service.engine.protocol import Tensor
from service.engine.tensors import from_torch, to_torch
from service.storage.statistics import StatisticsRecord, Stored

DEFINITIONS = ("pooled", "pooled_unbiased", "paper", "ema", "ema_debiased")
_PLACES = "histogram.places"


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


def encode(population: PopulationStatistics) -> bytes:
    return _save(population.to_tensors())


def decode(state: bytes) -> PopulationStatistics:
    return PopulationStatistics.from_tensors(_tensors(safetensors.load(state)))


def encode_histogram(histogram: Histogram) -> bytes:
    """Whole numbers in as few bytes as hold them, and places as distances: most of both are small."""
    tensors = histogram.to_tensors()
    places = tensors[_PLACES]
    tensors[_PLACES] = places.diff(prepend=places.new_zeros(1))
    return _save(tensors, is_narrow=True)


def decode_histogram(parts: Iterable[bytes], *, num_features: int) -> Histogram:
    """Of all parts together."""
    histogram = start(num_features)
    for part in parts:
        arrays = safetensors.load(part)
        if _PLACES not in arrays:  # totals from before there were histograms
            continue
        tensors = _tensors(arrays)
        if arrays[_PLACES].dtype.kind == "u":  # not distances where they came with the totals
            tensors[_PLACES] = tensors[_PLACES].cumsum(0)
        histogram = histogram.merge(Histogram.from_tensors(tensors))
    return histogram


def _save(tensors: Mapping[str, torch.Tensor], *, is_narrow: bool = False) -> bytes:
    arrays = {name: from_torch(tensor) for name, tensor in tensors.items()}
    return safetensors.save({name: _narrow(array) for name, array in arrays.items()} if is_narrow else arrays)


def _narrow(array: Tensor) -> Tensor:
    return array if array.dtype.kind == "f" else array.astype(np.min_scalar_type(array.max(initial=0)))


def _tensors(arrays: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: to_torch(array.astype(np.int64) if array.dtype.kind == "u" else array) for name, array in arrays.items()
    }


@cache
def prepare() -> None:
    """Compile what joins histograms: not in the database's thread, for which everybody waits."""
    decode_histogram((encode_histogram(start(1)),), num_features=1)


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
    """Of everything that decides what the frozen statistics compute and show."""
    record = stored.record
    meaning = {
        "num_features": record.num_features,
        "channel_axis": record.channel_axis,
        "momentum": record.momentum,
        "convention": record.convention,
    }
    head = orjson.dumps(meaning, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(b"".join((head, stored.state, *stored.parts))).hexdigest()
