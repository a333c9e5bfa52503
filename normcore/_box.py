"""A dense tensor seen as a box (B, R, G, K, S) in memory order, so that a few kernels serve every layout and method.

Statistics are over R, K and S, one per group (b, g). Weight and bias are (Q, G, K), each of the Q for as many of the
B * R rows. Batch norm of images is a box of R, G and S, channels last of R and G; layer norm one of B and K; group norm
B, G, K and S, channels last B, R, G and K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """How tensors of one shape and strides are seen, for axes that are reduced and axes that parameters vary along.

    Attributes:
        order: the tensor's axes in memory order.
        sizes: (B, R, G, K, S).
        per: rows of the B * R that share weight and bias.
        kept: the axes that statistics are one for each of, in memory order.
        affine: the same for weight and bias.
        shape: the tensor's.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int, int, int]
    per: int
    kept: tuple[int, ...]
    affine: tuple[int, ...]
    shape: tuple[int, ...]

    @cached_property
    def rows(self) -> int:
        return self.sizes[0] * self.sizes[1]

    @cached_property
    def width(self) -> int:
        """Channels of all groups."""
        return self.sizes[2] * self.sizes[3]

    @cached_property
    def groups(self) -> int:
        """Groups of all samples, each with statistics of its own."""
        return self.sizes[0] * self.sizes[2]

    @cached_property
    def count(self) -> int:
        """Values of a group."""
        return self.sizes[1] * self.sizes[3] * self.sizes[4]

    @cached_property
    def parameters_count(self) -> int:
        """Values of a weight or bias, Q * G * K."""
        return self.rows // self.per * self.width

    @cached_property
    def has_columns(self) -> bool:
        """Whether a group has one position per channel, in rows that lie apart."""
        return self.sizes[4] == 1 and self.sizes[1] > 1

    @cached_property
    def has_vectors(self) -> bool:
        """Whether a group has one position per channel, all side by side."""
        return self.sizes[4] == 1 and not self.has_columns

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """The tensor's axes along which statistics are the same; with those of size 1."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.kept)

    @cached_property
    def is_kept_in_order(self) -> bool:
        """Whether statistics have the order of the tensor's axes."""
        return _is_ascending(self.kept)

    @cached_property
    def is_affine_in_order(self) -> bool:
        """The same of weight and bias."""
        return _is_ascending(self.affine)

    def has_parameters_of(self, shape: tuple[int, ...]) -> bool:
        """Whether weight and bias of this shape are as kernels see them."""
        return self.is_affine_in_order and math.prod(shape) == self.parameters_count

    def statistics(self, tensors: Tensor) -> Tensor:
        """One per group: what broadcasts against the tensor, behind an axis of its own, as (*, B * G)."""
        if tensors.numel() == len(tensors) * self.groups and self.is_kept_in_order:
            return tensors.reshape(-1, self.groups)
        return torch.stack([self._flat(tensor, self.kept) for tensor in tensors])

    def parameters(self, tensor: Tensor) -> Tensor:
        """Weight or bias that broadcasts against the tensor as (Q * G * K,)."""
        if self.is_affine_in_order and tensor.numel() == self.parameters_count:
            return tensor if tensor.ndim == 1 else tensor.reshape(-1)
        return self._flat(tensor, self.affine)

    def restore_statistics(self, values: Tensor) -> Tensor:
        """(*, B * G) in a shape that broadcasts against the tensor, behind other axes."""
        return self._restored(values, self.kept)

    def restore_parameters(self, values: Tensor) -> Tensor:
        """(*, Q * G * K) in a shape that broadcasts against the tensor, behind other axes."""
        return self._restored(values, self.affine)

    def _flat(self, tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
        missing = len(self.shape) - tensor.ndim
        tensor = tensor[(None,) * missing] if missing else tensor
        sizes = [self.shape[axis] if axis in axes else 1 for axis in self.order]
        return tensor.permute(self.order).expand(sizes).reshape(-1)

    def _restored(self, values: Tensor, axes: tuple[int, ...]) -> Tensor:
        others = values.shape[:-1]
        if _is_ascending(axes):
            return values.view(*others, *[size if axis in axes else 1 for axis, size in enumerate(self.shape)])
        wide = values.view(*others, *[self.shape[axis] if axis in axes else 1 for axis in self.order])
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return wide.permute(*range(len(others)), *[len(others) + axis for axis in inverse])


def box_of(
    shape: tuple[int, ...], strides: tuple[int, ...], reduced: Sequence[int], *parameters: tuple[int, ...] | None
) -> Box | None:
    """The box of a dense tensor for statistics over `reduced` axes, and parameters of these shapes.

    None where there is none: strides with gaps, or axes in more turns than a box has.
    """
    shape, rank = tuple(shape), len(shape)
    given = [tuple(term) for term in parameters if term is not None]
    varying = {rank - len(term) + axis for term in given for axis, size in enumerate(term) if size != 1}
    order = tuple(sorted(range(len(shape)), key=lambda axis: (shape[axis] == 1, -strides[axis])))
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != expected:
            return None
        expected *= shape[axis]
    turns = [(axis, axis in reduced, axis in varying) for axis in order if shape[axis] != 1]
    return _parse(shape, order, turns)


def _parse(shape: tuple[int, ...], order: tuple[int, ...], turns: list[tuple[int, bool, bool]]) -> Box | None:
    """Take the axes from the last on, as S, K, G, R and B."""

    def take(is_reduced: bool, affine: Sequence[bool]) -> list[int]:
        taken: list[int] = []
        while turns and turns[-1][1] is is_reduced and turns[-1][2] in affine:
            taken.append(turns.pop()[0])
        return taken

    positions = take(True, [False])
    channels = take(True, [True])
    groups = take(False, [True])
    if not groups and ((not positions and not channels) or any(is_reduced for _, is_reduced, _ in turns)):
        groups = take(False, [False])
    rows = [(axis, is_affine) for axis, _, is_affine in turns]
    reduced, kept = take(True, [True, False]), take(False, [True, False])
    # Weight and bias are those of the first axes of a row, or of none.
    flags = [is_affine for _, is_affine in rows]
    if turns or flags != sorted(flags, reverse=True):
        return None
    sizes = [
        torch.Size([shape[axis] for axis in part]).numel() for part in (kept, reduced, groups, channels, positions)
    ]
    per = math.prod([shape[axis] for axis, is_affine in rows if not is_affine])
    affine = [axis for axis, is_affine in rows if is_affine] + [*reversed(groups), *reversed(channels)]
    return Box(
        order,
        (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]),
        per,
        (*reversed(kept), *reversed(groups)),
        tuple(affine),
        shape,
    )


@lru_cache(256)
def _is_ascending(axes: tuple[int, ...]) -> bool:
    return all(first < second for first, second in pairwise(axes))
