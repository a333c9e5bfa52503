"""Moments of a tensor that comes as a stream of bytes and is never held as a whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from normcore._checks import check_axis
from normcore.errors import ParameterError, ShapeError
from normcore.statistics.histogram import Histogram
from normcore.statistics.moments import Moments
from normcore.statistics.values import check_datatype

# Elements of a block, which stays in a core's second-level cache while it is summed.
_BLOCK = 2**20
# Channels shorter than this are taken over many samples at once: a merge costs more than so few values do.
_SHORT_CHANNEL = 256
_ROWS = 64
# Bound on the samples of many short channels that are held at once.
_LARGEST_BLOCK = 2**24


@dataclass(frozen=True, slots=True)
class _Block:
    """A contiguous part of the stream: (outer, channels, inner) from `first_channel` on."""

    shape: tuple[int, int, int]
    first_channel: int


class MomentsStream:
    """Accumulates the moments of one tensor from the bytes of its elements, little-endian, in order, in one pass.

    Values are summed in blocks about the block's mean in float64, and blocks merged as `Moments.merge` does; memory is
    bounded by a block (a few MiB, or up to 2^24 elements where a sample has very many channels) and O(C).

    Args:
        datatype: of the elements; any floating, integer or bool.
        shape: (N, C, *) of the tensor.
        channel_axis: the axis of the channels, from the back where negative.
        fortran_order: whether the first axis varies fastest in the stream, as npy files may say; else the last does.
        histogram: what to count the values into, beside their moments; `histogram` has the state after them.

    Raises:
        DtypeError: another datatype.
        ShapeError: fewer than two dimensions, or a histogram of another number of channels.
        ParameterError: a negative size, no such axis.

    >>> stream = MomentsStream(torch.float32, (2, 1))
    >>> stream.update(torch.tensor([1.0, 3.0]).numpy().tobytes())
    >>> stream.finish()
    Moments(count=tensor([2.], dtype=torch.float64), mean=tensor([2.], dtype=torch.float64), \
m2=tensor([2.], dtype=torch.float64))
    """

    def __init__(
        self,
        datatype: torch.dtype,
        shape: Sequence[int],
        *,
        channel_axis: int = 1,
        fortran_order: bool = False,
        histogram: Histogram | None = None,
    ) -> None:
        check_datatype("datatype", datatype)
        if any(type(size) is not int or size < 0 for size in shape):
            raise ParameterError("shape", expected="integers >= 0", received=f"{tuple(shape)}")
        if len(shape) < 2:
            raise ShapeError("shape", expected="at least 2 dimensions", received=f"{tuple(shape)}")
        axis = check_axis("channel_axis", channel_axis, rank=len(shape))
        # What Fortran's order makes of a shape, C's order makes of the shape reversed.
        sizes = tuple(reversed(shape)) if fortran_order else tuple(shape)
        axis = len(shape) - 1 - axis if fortran_order else axis
        self._datatype = datatype
        if histogram is not None and histogram.num_features != sizes[axis]:
            expected = f"{sizes[axis]} channels, as the shape has"
            raise ShapeError("histogram", expected=expected, received=f"{histogram.num_features} channels")
        self._histogram = histogram
        self._channels, self._inner = sizes[axis], math.prod(sizes[axis + 1 :])
        self._elements = math.prod(sizes)
        self._taken = 0
        self._moments = Moments.none(self._channels)
        self._buffer = memoryview(bytearray(self._largest_block() * datatype.itemsize))
        self._filled = 0

    @property
    def buffer_bytes(self) -> int:
        """Memory for the bytes of one block, all that is held of the stream."""
        return len(self._buffer)

    @property
    def expected_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self._elements * self._datatype.itemsize

    @property
    def received_bytes(self) -> int:
        """Bytes taken so far."""
        return self._taken * self._datatype.itemsize + self._filled

    @property
    def histogram(self) -> Histogram | None:
        """The histogram with the values of the blocks so far; all of them once `finish` has answered."""
        return self._histogram

    def update(self, buffer: bytes | bytearray | memoryview) -> None:
        """Take the next bytes, however many; they are read during the call only.

        Raises:
            ShapeError: more bytes than the tensor has; none of this call's are taken.
            StatisticsError: integers beyond 2^53, which float64 does not hold.
        """
        rest = memoryview(buffer).cast("B")
        if self.received_bytes + rest.nbytes > self.expected_bytes:
            received = f"at least {self.received_bytes + rest.nbytes}"
            raise ShapeError("buffer", expected=f"{self.expected_bytes} bytes in all", received=received)
        while rest.nbytes:
            block = self._next_block()
            size = math.prod(block.shape) * self._datatype.itemsize
            taken = min(size - self._filled, rest.nbytes)
            self._buffer[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == size:
                self._take(block)

    def finish(self) -> Moments:
        """The moments of the tensor.

        Raises:
            ShapeError: bytes are missing.
        """
        if self.received_bytes < self.expected_bytes:
            raise ShapeError("buffer", expected=f"{self.expected_bytes} bytes", received=f"{self.received_bytes}")
        return self._moments

    def _rows_at_once(self) -> int:
        """Samples in a block; 0 where one is more than a block."""
        row = max(1, self._channels * self._inner)
        if self._inner < _SHORT_CHANNEL:
            return max(1, _BLOCK // row, min(_ROWS, _LARGEST_BLOCK // row))
        return _BLOCK // row

    def _largest_block(self) -> int:
        return min(self._elements, max(_BLOCK, self._rows_at_once() * self._channels * self._inner))

    def _next_block(self) -> _Block:
        row, rows = self._channels * self._inner, self._rows_at_once()
        if rows:
            return _Block((min(rows, (self._elements - self._taken) // row), self._channels, self._inner), 0)
        channel, position = divmod(self._taken % row, self._inner)
        if self._inner >= _BLOCK:
            return _Block((1, 1, min(_BLOCK, self._inner - position)), channel)
        return _Block((1, min(_BLOCK // self._inner, self._channels - channel), self._inner), channel)

    def _take(self, block: _Block) -> None:
        elements = math.prod(block.shape)
        values = torch.frombuffer(self._buffer, dtype=self._datatype, count=elements).view(block.shape)
        if self._histogram is not None:
            self._histogram = self._histogram.update_channels(values, first_channel=block.first_channel)
        outer, channels, inner = block.shape
        width = max(1, _BLOCK // (outer * inner))
        parts = [Moments.of(part) for part in torch.split(values, width, dim=1)]
        self._merge(parts[0] if len(parts) == 1 else Moments.of_channels(parts), block.first_channel, channels)
        self._taken += elements
        self._filled = 0

    def _merge(self, moments: Moments, first: int, channels: int) -> None:
        if channels == self._channels:
            self._moments = self._moments.merge(moments)
            return
        before, same, after = self._moments.split([first, channels, self._channels - first - channels])
        self._moments = Moments.of_channels([before, same.merge(moments), after])
