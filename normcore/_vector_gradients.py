"""The compiled sweep of a backward over vectors: groups of one position per channel.

It computes what `_gradient_sweeps` has the formula of; sums of channels are those of many vectors.
"""

from typing import Any

import numpy as np

from normcore._compiled import compiled, fused
from normcore._far_output import arrive, piece, send, way_to
from normcore._gradient_sweeps import correction_terms
from normcore._sweeps import parameters_in, values_in
from normcore._values import as_read, parameters_at, read, store, three_at
from normcore._vector_sums import FEW, add_vector, move_sums


@compiled
def gradient_of_vectors(
    kind: Any,
    x: Any,
    grad: Any,
    out: Any,
    weight: Any,
    by: Any,
    means: Any,
    sums: Any,
    sizes: Any,
    steps: Any,
    start: int,
    stop: int,
) -> None:
    """The whole backward of groups of one position per channel, a slot of samples at a time; no gradient without `out`.

    `steps` is (samples per slot, rows of the B * R that share a weight, has_mean). Sums of dy and dy * xh
    over the samples of a slot go into `sums` (2, slots, G * K), and the means that correct the gradient into `means`;
    where `sums` has no slots, `means` are given.
    """
    samples, _, groups, channels, _ = sizes
    height, per, has_mean = steps
    has_sums, has_gradient = sums.shape[1] > 0, out != 0
    x, grad, out = three_at(kind, x, grad, out, values_in(sizes))
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    way = way_to(out, channels, channels)
    few = np.zeros((2, groups * channels if has_sums else 0), weight.dtype)
    for slot in range(start, stop):
        before, last = slot * height, min((slot + 1) * height, samples)
        for sample in range(slot * height, last):
            own = sample // per * groups * channels
            for index in range(groups):
                group, first = sample * groups + index, index * channels
                at, affine = np.uintp(group * channels), np.uintp(own + first)
                if has_sums:
                    total, dot = add_vector(x, grad, at, weight, affine, few, first, channels, by, group)
                    means[0, group] = total / channels if has_mean else 0.0
                    means[1, group] = dot / channels
                if has_gradient:
                    own_terms = correction_terms(x, by, group, means[0, group], means[1, group])
                    _combine_vector(x, grad, out, way, at, weight, affine, channels, own_terms)
            if has_sums and sample + 1 in (before + FEW, last):
                move_sums(x, grad, by, few, sums, slot, (before, sample + 1), before == slot * height)
                before = sample + 1
    if has_gradient:
        arrive(way)


@fused
def _combine_vector(
    x: Any, grad: Any, out: Any, way: Any, at: Any, weight: Any, affine: Any, channels: int, terms: Any
) -> None:
    center, slope, constant, wide = terms
    invstd = as_read(x, wide)
    end = at + np.uintp(channels)
    while at < end:
        length, place = piece(way, at, end)
        for index in range(length):
            correction = (read(x, at + index) - center) * slope + constant
            store(way[0], place + index, read(grad, at + index) * (weight[affine + index] * invstd) + correction)
        send(way, out, at, length)
        at += length
        affine += length
