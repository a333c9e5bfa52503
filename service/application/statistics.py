"""Statistics as a resource: many workers post batches to one, and its frozen copies serve inference."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from normcore.errors import ParameterError, ShapeError, StatisticsError
from normcore.statistics import Bins, Histogram, Moments, PopulationStatistics
from service.application import sample
from service.application.totals import (
    DEFINITIONS,
    Running,
    Snapshot,
    content_hash,
    count_of,
    decode,
    decode_histogram,
    encode,
    encode_histogram,
    running_of,
    snapshot,
)
from service.engine.tensors import from_torch
from service.errors import ConflictError
from service.settings import Settings
from service.storage.metadata import now
from service.storage.statistics import Check, Post, StatisticsRecord, StatisticsStore, Stored

Key = TypeVar("Key")
Value = TypeVar("Value")

_CACHED = 64


@dataclass(frozen=True, slots=True)
class NewStatistics:
    """What a caller asks for; `momentum` "default" is the convention's."""

    num_features: int
    name: str | None = None
    channel_axis: int = 1
    momentum: float | str | None = "default"
    convention: str = "torch"


@dataclass(frozen=True, slots=True)
class Batch:
    """A post, computed: its moments, a histogram of its values if it has any, and what its sender said of it."""

    moments: Moments
    histogram: bytes | None
    nan_policy: str
    key: str | None
    digest: str


class Statistics:
    """The use cases. What they compute from stored totals runs in the database's thread, within its transaction."""

    def __init__(self, *, store: StatisticsStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._frozen: dict[tuple[str, str], Running] = {}
        self._open: dict[str, StatisticsRecord] = {}

    async def create(self, wanted: NewStatistics) -> Snapshot:
        self._check_size(wanted.num_features)
        self._check_name(wanted.name)

        def make(_: Iterator[Stored]) -> Stored:
            start = PopulationStatistics.start(
                wanted.num_features,
                momentum=wanted.momentum,  # type: ignore[arg-type]  # the one text that comes here is "default"
                convention=wanted.convention,
            )
            record = StatisticsRecord(
                id=_new_id(),
                name=wanted.name,
                num_features=wanted.num_features,
                channel_axis=wanted.channel_axis,
                momentum=start.average.momentum if start.average else None,
                convention=wanted.convention,
                created_at=now(),
            )
            return Stored(record, encode(start))

        return await self._store.derive((), make, snapshot)

    async def get(self, statistics_id: str) -> Snapshot:
        return await self._store.read(statistics_id, snapshot)

    async def records(self) -> list[StatisticsRecord]:
        return await self._store.records()

    async def delete(self, statistics_id: str, *, check: Check) -> None:
        await self._store.delete(statistics_id, check)
        self._open.pop(statistics_id, None)
        for definition in DEFINITIONS:
            self._frozen.pop((statistics_id, definition), None)

    async def running(self, statistics_id: str, definition: str) -> Running:
        """What a resource says, as of now, in one of DEFINITIONS; frozen ones are remembered.

        Raises:
            StatisticsNotFoundError: no such resource.
            StatisticsError: it has no finite mean and variance of this definition in every channel.
        """
        known = self._frozen.get((statistics_id, definition))
        if known is not None:
            return known
        running, is_frozen = await self._store.read(
            statistics_id, lambda stored: (running_of(stored, definition), stored.record.is_frozen)
        )
        if is_frozen:
            _remember(self._frozen, (statistics_id, definition), running)
        return running

    async def open_for_posts(self, statistics_id: str) -> StatisticsRecord:
        """What never changes of the resource, before a post's body is read. Raises ConflictError for a frozen one."""
        record = self._open.get(statistics_id)
        if record is None:
            record = await self._store.record(statistics_id)
            _refuse_frozen(record)
            _remember(self._open, statistics_id, record)
        return record

    async def histogram(self, statistics_id: str, *, bins: int, channel: int | None) -> Bins:
        """Of one channel, or of all together.

        Raises:
            ParameterError: too many bins, no such channel, or channels that are not told apart.
            StatisticsError: no values were posted.
        """
        limit = self._settings.max_histogram_bins
        if not 1 <= bins <= limit:
            raise ParameterError("bins", expected=f"1 to {limit} (NORMSERVE_MAX_HISTOGRAM_BINS)", received=str(bins))

        def view(stored: Stored) -> Bins:
            if channel is not None and stored.record.num_features > sample.CHANNELS_APART:
                expected = f"none: more than {sample.CHANNELS_APART} channels are only counted together"
                raise ParameterError("channel", expected=expected, received=str(channel))
            histogram = _histogram_of(stored)
            if not bool(histogram.counts.any()):
                expected = "finite values in posted tensors; moments have none to count"
                raise StatisticsError("histogram", expected=expected, received="none")
            return histogram.histogram(bins, channel=channel)

        return await self._store.read(statistics_id, view, has_parts=True)

    async def post(self, statistics_id: str, batch: Batch, *, check: Check) -> tuple[dict[str, Any], bool]:
        """The answer to a batch, and whether it was given before."""

        def check_open(record: StatisticsRecord) -> None:
            _refuse_frozen(record)
            check(record)

        def change(stored: Stored) -> tuple[Stored, dict[str, Any]]:
            before = decode(stored.state)
            after = before.update(batch.moments, nan_policy=batch.nan_policy)
            is_counted = after is not before
            sequence = stored.record.sequence + is_counted
            record = replace(stored.record, sequence=sequence, batches=after.batches)
            answer = {
                "statistics": record.id,
                "sequence": sequence,
                "counted": is_counted,
                "count": count_of(from_torch(after.pooled_moments.count)),
                "batches": after.batches,
            }
            if not is_counted:
                return stored, answer
            parts = () if batch.histogram is None else (batch.histogram,)
            return Stored(record, encode(after), parts), answer

        def join(parts: Iterable[bytes]) -> bytes:
            return encode_histogram(decode_histogram(parts, num_features=batch.moments.count.numel()))

        return await self._store.post(statistics_id, Post(batch.key, batch.digest, check_open, change, join))

    async def freeze(self, statistics_id: str, *, check: Check) -> Snapshot:
        """An immutable copy of the present state; the source stays as it is."""

        def make(sources: Iterator[Stored]) -> Stored:
            source = next(sources)
            check(source.record)
            if source.record.batches == 0:
                raise ConflictError("statistics: nothing to freeze, no batch with values was posted")
            frozen = replace(source, parts=(encode_histogram(_histogram_of(source)),))
            record = replace(
                source.record,
                id=_new_id(),
                created_at=now(),
                content_hash=content_hash(frozen),
                sources=(source.record.id,),
            )
            return replace(frozen, record=record)

        return await self._store.derive((statistics_id,), make, snapshot)

    async def merge(self, ids: Sequence[str], *, name: str | None) -> Snapshot:
        """A new resource of all batches of the sources; it has no ema, for their batches have no order."""
        self._check_name(name)
        if len(set(ids)) != len(ids):
            raise ParameterError("ids", expected="each id once: its batches would count twice", received="one twice")

        def make(sources: Iterator[Stored]) -> Stored:
            source = next(sources)
            first, merged, histogram = source.record, decode(source.state).merge(), _histogram_of(source)
            for source in sources:  # one after another: together they may not fit in memory
                _check_mergeable(first, source.record)
                merged = merged.merge(decode(source.state))
                histogram = histogram.merge(_histogram_of(source))
            record = replace(
                first,
                id=_new_id(),
                name=name,
                momentum=None,
                created_at=now(),
                sequence=0,
                batches=merged.batches,
                content_hash=None,
                sources=tuple(ids),
            )
            return Stored(record, encode(merged), (encode_histogram(histogram),))

        return await self._store.derive(ids, make, snapshot)

    def _check_size(self, num_features: int) -> None:
        limit = self._settings.max_num_features
        if num_features > limit:
            expected = f"at most {limit} (NORMSERVE_MAX_NUM_FEATURES)"
            raise ParameterError("num_features", expected=expected, received=str(num_features))

    def _check_name(self, name: str | None) -> None:
        limit = self._settings.max_name_length
        if name is not None and not 0 < len(name) <= limit:
            expected = f"1 to {limit} characters (NORMSERVE_MAX_NAME_LENGTH), or null"
            raise ParameterError("name", expected=expected, received=f"{len(name)} characters")


def check_channels(record: StatisticsRecord, shape: Sequence[int]) -> None:
    """Refuse a tensor without the resource's channels on its axis, before its data is looked at."""
    axis, rank = record.channel_axis, len(shape)
    if rank < 2 or not -rank <= axis < rank or shape[axis] != record.num_features:
        expected = f"a tensor with {record.num_features} channels on axis {axis}"
        raise ShapeError("input", expected=expected, received=f"shape {list(shape)}")


def _remember(kept: dict[Key, Value], key: Key, value: Value) -> None:
    while len(kept) >= _CACHED:
        del kept[next(iter(kept))]
    kept[key] = value


def _histogram_of(stored: Stored) -> Histogram:
    return decode_histogram(stored.parts, num_features=stored.record.num_features)


def _refuse_frozen(record: StatisticsRecord) -> None:
    if record.is_frozen:
        raise ConflictError("statistics: frozen ones take no posts; post to the resource that they were frozen from")


def _check_mergeable(first: StatisticsRecord, other: StatisticsRecord) -> None:
    for field in ("num_features", "channel_axis", "convention"):
        expected, received = getattr(first, field), getattr(other, field)
        if expected != received:
            raise StatisticsError("ids", expected=f"{field} {expected} in all", received=f"{received} in {other.id}")


def _new_id() -> str:
    return secrets.token_hex(16)
