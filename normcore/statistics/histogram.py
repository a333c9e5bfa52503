"""Histograms per channel and overall: exact counts in cells, which add up over batches and workers in any order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._checks import check_axis, check_batch_count, check_rank
from normcore._slab import Slab
from normcore.errors import DtypeError, NotSupportedError, ParameterError, ShapeError, StatisticsError
from normcore.statistics.named_tensors import per_channel_named, tensor_named
from normcore.statistics.values import exact_values, expanded_mask

CELLS = 1024
# Values that are brought to float64 at a time.
_BLOCK = 2**18
# With more, only all of them together are counted: a channel takes 8 KiB.
MAX_CHANNELS = 4096
MAX_BINS = 10_000
# A histogram of a single value is drawn 1 wide around it, or wider where float64 could not tell the edges apart.
_HALF_WIDTH_OF_ONE_VALUE = 2.0**-20


@dataclass(frozen=True, slots=True)
class Bins:
    """Counts in bins of equal width, told from counts in cells.

    Attributes:
        edges: float64 (bins + 1,), from the smallest value to the largest.
        counts: float64 (bins,); a cell that an edge cuts is shared out as if its values lay evenly in it.
        density: counts / (their sum x width), so that the area is 1.
        error: what the share of values below any edge is off by at most: the largest share a cut cell has.
        non_finite: values that are NaN or infinite, which no bin counts.
    """

    edges: Tensor
    counts: Tensor
    density: Tensor
    error: float
    non_finite: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often values occurred, in 1024 cells per channel between the smallest and the largest; immutable.

    Cells have 1/16 of an octave or less (1/32 where all values have one sign, finer where they span less than 24
    octaves), and magnitudes below the largest's by 2^24 count as 0. They follow from smallest and largest value alone,
    and counts are exact: the state is a function of the set of values, however it was split and in whatever order.

    Attributes:
        num_features: C.
        smallest: finite value, float64 of shape (C,), or (1,) for more than MAX_CHANNELS; infinity where there is none.
        largest: the same; -infinity where there is none.
        counts: int64 (rows, 1024).
        non_finite: values that are NaN or infinite; int64 (rows,).

    >>> state = Histogram.start(1).update(torch.tensor([[0.0], [1.0], [1.0], [4.0]]))
    >>> state.histogram(2).counts
    tensor([3., 1.], dtype=torch.float64)
    """

    num_features: int
    smallest: Tensor
    largest: Tensor
    counts: Tensor
    non_finite: Tensor

    @classmethod
    def start(cls, num_features: int) -> "Histogram":
        """The state before any value.

        Raises:
            ParameterError: num_features < 1.
        """
        if type(num_features) is not int or num_features < 1:
            raise ParameterError("num_features", expected="an integer >= 1", received=repr(num_features))
        rows = num_features if num_features <= MAX_CHANNELS else 1
        infinity = torch.full((rows,), math.inf, dtype=torch.float64)
        counts = torch.zeros(rows, CELLS, dtype=torch.int64)
        return cls(num_features, infinity, -infinity, counts, torch.zeros(rows, dtype=torch.int64))

    @property
    def has_channels(self) -> bool:
        """Whether channels are counted apart."""
        return self.num_features <= MAX_CHANNELS

    def update(self, input: Tensor, *, channel_axis: int = 1, mask: Tensor | None = None) -> "Histogram":
        """The state after the values of one more input.

        Args:
            input: (N, C, *) of any floating, integer or bool datatype, on the CPU.
            channel_axis: the axis of the channels, from the back where negative.
            mask: bool, true where a position is counted, as in `Moments.of`.

        Raises:
            DtypeError: another datatype, or a mask that is not bool.
            ShapeError: fewer than two dimensions, another number of channels, a mask that does not broadcast.
            ParameterError: no such axis.
            StatisticsError: integers beyond 2^53.
        """
        check_rank("input", input, minimum=2)
        axis = check_axis("channel_axis", channel_axis, rank=input.ndim)
        if input.shape[axis] != self.num_features:
            received = f"{input.shape[axis]} channels"
            raise ShapeError("input", expected=f"{self.num_features} channels", received=received)
        counted = None if mask is None else expanded_mask("mask", mask, shape=input.shape, channel_axis=axis)
        if input.numel() == 0:
            return self
        slab = Slab.of(input.detach(), channel_axis=axis)
        mask = None if counted is None else slab.seen_alike(counted).reshape(-1)
        return self.update_sample(slab.values.reshape(-1), step=1, inner=slab.values.shape[2], mask=mask)

    def update_sample(self, values: Tensor, *, step: int, inner: int, mask: Tensor | None = None) -> "Histogram":
        """The state after every `step`-th value of a tensor in the order of its memory, from its first one on.

        Args:
            values: (K,) of any floating, integer or bool datatype, on the CPU.
            step: from one value to the next.
            inner: values of a channel that lie side by side in the tensor.
            mask: bool (K,), true where a value is counted.

        Raises:
            DtypeError: another datatype.
            StatisticsError: integers beyond 2^53.
        """
        from normcore.statistics import cells

        state = [tensor.clone() for tensor in self._tensors()]
        arrays = [tensor.numpy() for tensor in state]
        counted = torch.empty(0, dtype=torch.bool) if mask is None else mask
        for start in range(0, values.numel(), _BLOCK):
            block = exact_values("input", values[start : start + _BLOCK]).double().contiguous()
            inside = counted[start : start + _BLOCK].contiguous()
            cells.count_values(block.numpy(), inside.numpy(), start * step, step, inner, *arrays)
        return Histogram(self.num_features, *state)

    def merge(self, *others: "Histogram") -> "Histogram":
        """The state of the values of all parts together, exactly as if one had counted them all.

        Raises:
            ShapeError: the numbers of channels differ.
        """
        for other in others:
            if other.num_features != self.num_features:
                expected, received = f"{self.num_features} channels", f"{other.num_features} channels"
                raise ShapeError("others", expected=expected, received=received)
        from normcore.statistics import cells

        state = [tensor.clone() for tensor in self._tensors()]
        for other in others:
            cells.count_state(
                tuple(tensor.numpy() for tensor in other._tensors()), *[tensor.numpy() for tensor in state]
            )
        return Histogram(self.num_features, *state)

    def histogram(self, bins: int, *, channel: int | None = None) -> Bins:
        """Counts in bins of equal width, of one channel, or of all together.

        Raises:
            ParameterError: bins outside 1 to MAX_BINS, or no such channel.
            StatisticsError: there is no finite value to count.
            NotSupportedError: a channel, where there are more than MAX_CHANNELS.
        """
        if type(bins) is not int or not 1 <= bins <= MAX_BINS:
            raise ParameterError("bins", expected=f"an integer from 1 to {MAX_BINS}", received=repr(bins))
        state = self._overall() if channel is None else self._of_channel(channel)
        if not bool(state.counts.any()):
            raise StatisticsError("histogram", expected="a finite value to count", received="none")
        edges = _even_edges(float(state.smallest), float(state.largest), bins=bins)
        cell_edges = state._cell_edges()
        total = int(state.counts.sum())
        below = torch.cat([torch.zeros(1, dtype=torch.int64), state.counts[0].cumsum(0)])
        inner = edges[1:-1].contiguous()
        cell = (torch.searchsorted(cell_edges, inner, right=True) - 1).clamp(0, CELLS - 1)
        width = cell_edges[cell + 1] - cell_edges[cell]
        position = ((inner - cell_edges[cell]) / width).nan_to_num(nan=0.0).clamp(0.0, 1.0)
        cut = state.counts[0][cell].where((position > 0) & (position < 1), 0)
        cumulative = torch.cat([below[:1], below[cell] + position * state.counts[0][cell], below[-1:]]).double()
        counts = cumulative.diff()
        error = int(cut.max()) / total if bins > 1 else 0.0
        return Bins(edges, counts, counts / (total * edges.diff()), error, int(state.non_finite))

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as named float64 and int64 tensors, without loss and without the cells that are empty."""
        places = self.counts.flatten().nonzero()[:, 0]
        return {
            "histogram.num_features": torch.tensor(self.num_features),
            "histogram.smallest": self.smallest,
            "histogram.largest": self.largest,
            "histogram.places": places,
            "histogram.counts": self.counts.flatten()[places],
            "histogram.non_finite": self.non_finite,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Histogram":
        """The state that `to_tensors` wrote.

        Raises:
            StatisticsError: a tensor is missing, or counts something impossible.
            DtypeError, ShapeError: one of another datatype or shape.
        """
        num_features = tensor_named(tensors, "histogram.num_features")
        check_batch_count("histogram.num_features", num_features)
        state = cls.start(int(num_features))
        rows = state.smallest.numel()
        smallest, largest = (
            per_channel_named(tensors, f"histogram.{name}", num_features=rows) for name in ("smallest", "largest")
        )
        places, counts, non_finite = (
            _whole_numbers(f"histogram.{name}", tensor_named(tensors, f"histogram.{name}"))
            for name in ("places", "counts", "non_finite")
        )
        if places.shape != counts.shape or non_finite.numel() != rows or bool((places >= rows * CELLS).any()):
            expected = f"a count for each of the places below {rows * CELLS}, and {rows} numbers of non-finite values"
            received = f"shapes {tuple(counts.shape)}, {tuple(places.shape)} and {tuple(non_finite.shape)}"
            raise ShapeError("histogram.counts", expected=expected, received=received)
        dense = state.counts.flatten().scatter(0, places, counts).view_as(state.counts)
        return cls(state.num_features, smallest, largest, dense, non_finite)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.smallest, self.largest, self.counts, self.non_finite

    def _cell_edges(self) -> Tensor:
        from normcore.statistics import cells

        return torch.from_numpy(cells.edges_of(self.smallest.numpy(), self.largest.numpy()))

    def _overall(self) -> "Histogram":
        rows = (Histogram(1, *(tensor[row : row + 1] for tensor in self._tensors())) for row in range(len(self.counts)))
        return Histogram.start(1).merge(*rows)

    def _of_channel(self, channel: int) -> "Histogram":
        if not self.has_channels:
            raise NotSupportedError(f"histogram: no channels apart with more than {MAX_CHANNELS}; ask for all together")
        if type(channel) is not int or not 0 <= channel < self.num_features:
            expected = f"an integer from 0 to {self.num_features - 1}"
            raise ParameterError("channel", expected=expected, received=repr(channel))
        row = slice(channel, channel + 1)
        return Histogram(1, self.smallest[row], self.largest[row], self.counts[row], self.non_finite[row])


def _even_edges(low: float, high: float, *, bins: int) -> Tensor:
    if low == high:
        half = max(0.5, abs(low) * _HALF_WIDTH_OF_ONE_VALUE)
        low, high = low - half, high + half
    share = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    # Not low + share (high - low), which may overflow.
    return low * (1 - share) + high * share


def _whole_numbers(argument: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.int64:
        raise DtypeError(argument, expected="int64", received=str(tensor.dtype).removeprefix("torch."))
    if tensor.ndim != 1:
        raise ShapeError(argument, expected="one dimension", received=f"shape {tuple(tensor.shape)}")
    if bool((tensor < 0).any()):
        raise StatisticsError(argument, expected="numbers >= 0", received=f"{int(tensor.min())}")
    return tensor
