"""Weights of linear operators in float64: scaled by output or input channel, summed up, embedded in larger kernels.

Convolutions store (C_out, C_in / groups, k...), transposed ones (C_in, C_out / groups, k...); input channel i of group
g is row i of that group only. The number of groups comes from the caller: a square weight fits several.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Exact = NDArray[np.float64]


def scale_axis(weight: Exact, scale: Exact, *, axis: int) -> Exact:
    """The weight, scaled along one axis.

    >>> scale_axis(np.ones((2, 2)), np.array([2.0, 3.0]), axis=1)
    array([[2., 3.],
           [2., 3.]])
    """
    return weight * scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])


def scale_conv_inputs(weight: Exact, scale: Exact, *, groups: int) -> Exact:
    """W'[o, i] = scale[g, i] W[o, i] for a convolution, where o is in group g."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    factors = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return np.asarray((grouped * factors).reshape(weight.shape))


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


def scale_transposed_outputs(weight: Exact, scale: Exact, *, groups: int) -> Exact:
    """W'[g, :, j] = scale[g, j] W[g, :, j] for a transposed convolution."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    factors = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return np.asarray((grouped * factors).reshape(weight.shape))


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
    "point_response",
    "scale_axis",
    "scale_conv_inputs",
    "scale_transposed_outputs",
    "transposed_rows",
]
