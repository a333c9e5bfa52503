"""Posted tensors to moments, off the event loop: whole ones, and streams that are never held as a whole."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from normcore.errors import DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.statistics import Moments, MomentsStream
from normcore.statistics.values import exact_values, expanded_mask
from service.application.sample import Sample
from service.application.statistics import check_channels
from service.application.totals import encode_histogram, prepare
from service.datatypes import BOOL, Datatype
from service.engine.protocol import Tensor, Tensors
from service.engine.tensors import to_torch, torch_datatype
from service.engine.worker import Worker
from service.errors import PayloadMalformedError
from service.storage.statistics import StatisticsRecord

if TYPE_CHECKING:
    from service.engine.batch import Ran

TENSOR_NAMES = ("input", "mask", "count", "mean", "m2")
MOMENT_NAMES = TENSOR_NAMES[2:]
# Fewer bytes at a time cost more in hand-overs between the threads; more leave one of them idle.
_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Reduced:
    """What a post comes to; moments alone have no values to make an (encoded) histogram of."""

    moments: Moments
    histogram: bytes | None = None


class Digest(Protocol):
    """A hash of what a caller sends."""

    def update(self, data: bytes | memoryview, /) -> None: ...


class Batches:
    """Reduces tensors to moments in a thread of its own."""

    def __init__(self, worker: Worker, *, deadline_s: float, histogram_values: int) -> None:
        self._worker = worker
        self._deadline_s = deadline_s
        self._histogram_values = histogram_values

    async def reduce(
        self, record: StatisticsRecord, tensors: Tensors, *, body: memoryview, digest: Digest | None
    ) -> Reduced:
        """Moments of the tensor `input`, of those positions that `mask` counts; or those given, checked."""
        names = set(tensors)
        are_given = names == set(MOMENT_NAMES)
        if not are_given and names not in ({"input"}, {"input", "mask"}):
            expected = f"input, input and mask, or {', '.join(MOMENT_NAMES)}"
            raise ParameterError("tensors", expected=expected, received=", ".join(sorted(names)) or "none")
        if not are_given:
            check_channels(record, tensors["input"].shape)

        def compute() -> Reduced:
            if digest is not None:
                digest.update(body)
            prepare()
            given = {name: to_torch(array, argument=name) for name, array in tensors.items()}
            if are_given:
                return Reduced(_possible(Moments(*(_per_channel(name, given[name], record) for name in MOMENT_NAMES))))
            moments = Moments.of(given["input"], channel_axis=record.channel_axis, mask=given.get("mask"))
            return Reduced(moments, self._histogram(tensors["input"], given.get("mask"), record))

        return (await self._worker.submit(compute, deadline_s=self._deadline_s)).result

    def _histogram(self, values: Tensor, mask: torch.Tensor | None, record: StatisticsRecord) -> bytes:
        axis = record.channel_axis % values.ndim
        sample = Sample(values.shape, channel_axis=axis, limit=self._histogram_values)
        sample.take(values.reshape(-1))
        if mask is None:
            return encode_histogram(sample.histogram())
        counted = sample.pick(expanded_mask("mask", mask, shape=values.shape, channel_axis=axis).numpy())
        return encode_histogram(sample.histogram(counted))

    def stream(
        self,
        record: StatisticsRecord,
        datatype: Datatype,
        shape: Sequence[int],
        *,
        is_transposed: bool,
        is_swapped: bool,
        digest: Digest | None,
    ) -> "BatchStream":
        """What takes the data of the tensor `input` in pieces. Raises ShapeError or DtypeError."""
        check_channels(record, shape)
        moments = MomentsStream(
            torch_datatype(datatype), shape, channel_axis=record.channel_axis, fortran_order=is_transposed
        )
        axis = record.channel_axis % len(shape)
        stored, axis = (shape[::-1], len(shape) - 1 - axis) if is_transposed else (shape, axis)
        sample = Sample(stored, channel_axis=axis, limit=self._histogram_values)
        reader = _Reader(datatype, is_swapped=is_swapped)
        return BatchStream(self._worker, moments, sample, reader, digest, deadline_s=self._deadline_s)


def _per_channel(name: str, tensor: torch.Tensor, record: StatisticsRecord) -> torch.Tensor:
    """Numbers of moments as float64 (C,); a single count is that of every channel."""
    if tensor.dtype == torch.bool:
        raise DtypeError(name, expected="numbers", received="bool")
    shape = (record.num_features,)
    if tensor.shape != shape and not (name == "count" and tensor.ndim == 0):
        expected = f"one value for each of {record.num_features} channels"
        raise ShapeError(name, expected=expected, received=f"shape {list(tensor.shape)}")
    return exact_values(name, tensor).double().expand(shape)


def _possible(moments: Moments) -> Moments:
    """Refuse squares that so few values cannot have; not NaN, which nan_policy judges."""
    if bool(((moments.count <= 1) & (moments.m2 > 0)).any()):
        raise StatisticsError("m2", expected="0 where count is 0 or 1", received=f"{float(moments.m2.max()):g}")
    return moments


class BatchStream:
    """Takes pieces while the worker sums those before: at most one block is being summed and one collected."""

    def __init__(
        self,
        worker: Worker,
        moments: MomentsStream,
        sample: Sample,
        reader: "_Reader",
        digest: Digest | None,
        *,
        deadline_s: float,
    ) -> None:
        self._worker = worker
        self._moments = moments
        self._sample = sample
        self._reader = reader
        self._digest = digest
        self._deadline_s = deadline_s
        self._pieces: list[bytes] = []
        self._collected_bytes = 0
        self._running: asyncio.Future[Ran[None]] | None = None

    @property
    def buffer_bytes(self) -> int:
        """The memory that it takes, however long the stream is."""
        return min(2 * _BLOCK_BYTES, self._moments.expected_bytes) + self._moments.buffer_bytes

    async def write(self, piece: bytes) -> None:
        """Take a piece; waits while the worker is behind, so that the sender is held back."""
        self._pieces.append(piece)
        self._collected_bytes += len(piece)
        if self._collected_bytes >= _BLOCK_BYTES:
            await self._hand_over()

    async def finish(self) -> Reduced:
        """What the tensor, all of which is here, comes to."""
        await self._wait()
        pieces, self._pieces = self._pieces, []

        def end() -> Reduced:
            prepare()
            self._sum(pieces)
            return Reduced(self._moments.finish(), encode_histogram(self._sample.histogram()))

        return (await self._worker.submit(end, deadline_s=self._deadline_s)).result

    async def close(self) -> None:
        """Let go of what still runs; nothing comes of it."""
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._running

    async def _hand_over(self) -> None:
        await self._wait()
        pieces, self._pieces, self._collected_bytes = self._pieces, [], 0
        self._running = asyncio.ensure_future(
            self._worker.submit(lambda: self._sum(pieces), deadline_s=self._deadline_s)
        )

    async def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            await running

    def _sum(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            if self._digest is not None:
                self._digest.update(piece)
            for values in self._reader.elements(piece):
                self._sample.take(values)
                if self._reader.is_swapped:
                    self._moments.update(values.tobytes())
            if not self._reader.is_swapped:
                self._moments.update(piece)


class _Reader:
    """Whole elements, in native byte order, of a stream that is cut anywhere; views where no bytes have to move."""

    def __init__(self, datatype: Datatype, *, is_swapped: bool) -> None:
        self.is_swapped = is_swapped
        self._datatype = datatype
        self._rest = b""

    def elements(self, piece: bytes) -> Iterator[Tensor]:
        size = self._datatype.itemsize
        missing = -len(self._rest) % size
        if missing:
            self._rest += piece[:missing]
            if len(self._rest) == size:
                yield self._native(self._rest)
                self._rest = b""
        skipped = min(missing, len(piece))
        end = skipped + (len(piece) - skipped) // size * size
        if end > skipped:
            yield self._native(memoryview(piece)[skipped:end])
        if end < len(piece):
            self._rest = piece[end:]

    def _native(self, data: bytes | memoryview) -> Tensor:
        if self.is_swapped:
            size = self._datatype.itemsize
            return np.frombuffer(data, f">u{size}").astype(f"=u{size}").view(self._datatype.numpy)
        if self._datatype is BOOL and (largest := np.frombuffer(data, np.uint8).max()) > 1:
            raise PayloadMalformedError(f"input: expected BOOL bytes of 0 and 1, received {largest}")
        return np.frombuffer(data, self._datatype.numpy)
