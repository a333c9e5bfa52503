"""Weights of linear operators in float64: scaled by output or input channel, summed up, embedded in larger kernels.

Convolutions store (C_out, C_in / groups, k...), transposed ones (C_in, C_out / groups, k...); input channel i of group
g is row i of that group only. The number of groups comes from the caller: a square weight fits several.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Exact = NDArray[np.float64]


def on_axis(scale: Exact, axis: int, *, rank: int) -> Exact:
    """One number per place on an axis, as a factor that broadcasts over a weight.

    >>> np.ones((2, 2)) * on_axis(np.array([2.0, 3.0]), 1, rank=2)
    array([[2., 3.],
           [2., 3.]])
    """
    return scale.reshape([-1 if index == axis else 1 for index in range(rank)])


def on_groups(scale: Exact, shape: tuple[int, ...], *, groups: int) -> Exact:
    """One number per place on axis 1 of each group of rows, as a factor that broadcasts over a weight of that shape.

    These are the input channels of a convolution and the output channels of a transposed one: W'[r, c] = scale[g, c]
    W[r, c], where row r is in group g.

    >>> on_groups(np.arange(4.0), (2, 2, 1), groups=2)[:, :, 0]
    array([[0., 1.],
           [2., 3.]])
    """
    rows = scale.reshape(groups, shape[1], *[1] * (len(shape) - 2))
    return rows if groups == 1 else np.repeat(rows, shape[0] // groups, axis=0)


def conv_response(weight: Exact, shift: Exact, *, groups: int) -> Exact:
    """What a convolution gives for the constant input `shift`, (C_out,): sum over i, k of W[o, i, k] shift[g, i]."""
    taps = weight.reshape(groups, -1, *weight.shape[1:]).sum(axis=tuple(range(3, weight.ndim + 1)))
    return np.asarray(np.einsum("goi,gi->go", taps, shift.reshape(groups, -1)).reshape(-1))


def conv_constant(weight: Exact, shift: Exact, masks: Sequence[Exact], *, groups: int) -> Exact:
    """What a zero-padded convolution gives for the constant input `shift`, (C_out, positions...).

    masks: for each spatial axis, (taps, positions): 1 where the tap of that output position is inside of the input.
    """
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    result = np.einsum("goi...,gi->go...", grouped, shift.reshape(groups, -1)).reshape(-1, *weight.shape[2:])
    for mask in masks:  # each takes the first spatial axis and puts its positions last
        result = np.tensordot(result, mask, axes=(1, 0))
    return np.asarray(result)


def rows_of(weight: Exact) -> Exact:
    """A convolution's weight as (C_out, K): what each output channel is made with."""
    return weight.reshape(len(weight), -1)


def transposed_rows(weight: Exact, *, groups: int) -> Exact:
    """A transposed convolution's weight as (C_out, K): what each output channel is made with."""
    grouped = np.moveaxis(weight.reshape(groups, -1, *weight.shape[1:]), 2, 1)
    return grouped.reshape(groups * weight.shape[1], -1)


def point_response(weight: Exact, shift: Exact, *, groups: int) -> Exact:
    """conv_response of a transposed convolution with a kernel of one tap, (C_out,)."""
    taps = weight.reshape(groups, -1, weight.shape[1])
    return np.asarray(np.einsum("gij,gi->gj", taps, shift.reshape(groups, -1)).reshape(-1))


def dirac(scale: Exact, *, groups: int, kernel: tuple[int, ...], offset: tuple[int, ...]) -> Exact:
    """The convolution that multiplies each of C channels by its scale: one tap at `offset`, input i of its group."""
    channels, per_group = scale.size, scale.size // groups
    weight = np.zeros((channels, per_group, *kernel))
    outputs = np.arange(channels)
    weight.reshape(channels, per_group, -1)[outputs, outputs % per_group, np.ravel_multi_index(offset, kernel)] = scale
    return weight


def embed(weight: Exact, *, kernel: tuple[int, ...], offset: tuple[int, ...], dilation: tuple[int, ...]) -> Exact:
    """The same filters in a larger kernel of zeros: tap i moves to offset + dilation i."""
    wide = np.zeros((*weight.shape[:2], *kernel))
    places = [
        slice(start, start + step * (size - 1) + 1, step)
        for start, step, size in zip(offset, dilation, weight.shape[2:], strict=True)
    ]
    wide[(slice(None), slice(None), *places)] = weight
    return wide


__all__ = [
    "Exact",
    "conv_constant",
    "conv_response",
    "dirac",
    "embed",
    "on_axis",
    "on_groups",
    "point_response",
    "rows_of",
    "transposed_rows",
]
