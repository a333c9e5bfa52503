"""Moments of a tensor that comes as a stream of bytes and is never held as a whole."""

import math
from collections.abc import Sequence

import torch

from normcore._checks import check_axis
from normcore.errors import ParameterError, ShapeError
from normcore.statistics.blocks import Block, add_block, blocks_of, largest_block
from normcore.statistics.moments import Moments
from normcore.statistics.values import check_datatype


class MomentsStream:
    """Accumulates the moments of one tensor from the bytes of its elements, little-endian, in order, in one pass.

    Values are summed in blocks about the block's mean in float64, and blocks merged as `Moments.merge` does; memory is
    bounded by a block (2^16 elements, or up to 2^22 where a sample has very many channels) and O(C).

    Args:
        datatype: of the elements; any floating, integer or bool.
        shape: (N, C, *) of the tensor.
        channel_axis: the axis of the channels, from the back where negative.
        fortran_order: whether the first axis varies fastest in the stream, as npy files may say; else the last does.

    Raises:
        DtypeError: another datatype.
        ShapeError: fewer than two dimensions.
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
        slab = (math.prod(sizes[:axis]), sizes[axis], math.prod(sizes[axis + 1 :]))
        self._elements = math.prod(slab)
        self._taken = 0
        self._state = torch.zeros(5, sizes[axis], dtype=torch.float64)
        self._buffer = memoryview(bytearray(largest_block(*slab) * datatype.itemsize))
        self._filled = 0
        self._blocks = blocks_of(*slab)
        self._block = next(self._blocks, None)

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
        while rest.nbytes and self._block is not None:
            size = self._block.elements * self._datatype.itemsize
            taken = min(size - self._filled, rest.nbytes)
            self._buffer[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == size:
                self._take(self._block)

    def finish(self) -> Moments:
        """The moments of the tensor.

        Raises:
            ShapeError: bytes are missing.
        """
        if self.received_bytes < self.expected_bytes:
            raise ShapeError("buffer", expected=f"{self.expected_bytes} bytes", received=f"{self.received_bytes}")
        return Moments.of_state(self._state.clone())

    def _take(self, block: Block) -> None:
        values = torch.frombuffer(self._buffer, dtype=self._datatype, count=block.elements)
        add_block(values, self._state, block)
        self._taken += block.elements
        self._filled = 0
        self._block = next(self._blocks, None)
