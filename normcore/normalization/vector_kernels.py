"""Compiled sweeps over vectors (outer, length, inner) in memory order: norms, division by them, and its gradient.

Everything is computed in float64, where squares of float32 values neither overflow nor vanish. Vectors along the last
axis are summed one after the other, others side by side.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from torch import Tensor

from normcore._compiled import compiled, compiled_sum, divide, flat
from normcore._values import as_computed, load, store

_NOTHING = np.empty(0)
# Vectors side by side that are worked on together, so that what is between two sweeps stays in the cache.
_WIDTH = 256
# Scales that float32 holds in full, among products that it holds.
_LEAST, _LARGEST = 1e-30, 1e30


def sweep(
    kernel: Any, sizes: tuple[int, int, int], tensors: tuple[Tensor | None, ...], order: float, eps: float
) -> None:
    """Call a kernel below for all vectors; a tensor that is None is one of no elements."""
    outer, length, inner = sizes
    units = outer * ((inner + _WIDTH - 1) // _WIDTH)
    arrays = [_NOTHING if tensor is None else flat(tensor) for tensor in tensors]
    divide(kernel, units, outer * length * inner, *arrays, length, inner, float(order), float(eps))


@compiled
def divide_vectors(
    values: Any,
    output: Any,
    norms: Any,
    factors: Any,
    length: int,
    inner: int,
    order: float,
    eps: float,
    start: int,
    stop: int,
) -> None:
    """Output x * factor / max(norm, eps) and norms of the units from start to stop: one vector each, or _WIDTH.

    No factors stand for 1.
    """
    scales = np.empty(_WIDTH)
    blocks = (inner + _WIDTH - 1) // _WIDTH
    for unit in range(start, stop):
        first = unit % blocks * _WIDTH
        width = min(_WIDTH, inner - first)
        vector = unit // blocks * inner + first
        begin = unit // blocks * length * inner + first
        if inner == 1:
            scales[0] = _norm(values, begin, length, order)
        else:
            _norms(values, scales[:width], begin, length, inner, order)
        for column in range(width):
            norms[vector + column] = scales[column]
            scales[column] = _reciprocal(scales[column], eps)
            if factors.size:
                scales[column] *= factors[vector + column]
        if inner > 1:
            for at in range(begin, begin + length * inner, inner):
                _scale_beside(values, output, at, width, scales)
        elif _LEAST < scales[0] < _LARGEST:
            _scale(values, output, begin, length, _narrow(values, scales[0]))
        else:
            _scale(values, output, begin, length, scales[0])


@compiled
def divide_gradients(
    grad_output: Any,
    values: Any,
    gradient: Any,
    norms: Any,
    projections: Any,
    factors: Any,
    length: int,
    inner: int,
    order: float,
    eps: float,
    start: int,
    stop: int,
) -> None:
    """Gradient of the values, factor * (dy - <dy, y> w) / norm, norms, and projections <dy, y>, for y = x / norm."""
    own_norms, slopes, scales = np.empty(_WIDTH), np.empty(_WIDTH), np.empty(_WIDTH)
    blocks = (inner + _WIDTH - 1) // _WIDTH
    for unit in range(start, stop):
        first = unit % blocks * _WIDTH
        width = min(_WIDTH, inner - first)
        vector = unit // blocks * inner + first
        begin = unit // blocks * length * inner + first
        _measure(grad_output, values, own_norms[:width], slopes[:width], begin, length, inner, order)
        for column in range(width):
            norm = own_norms[column]
            reciprocal = _reciprocal(norm, eps)
            norms[vector + column] = norm
            projections[vector + column] = slopes[column] * reciprocal
            scales[column] = reciprocal
            if factors.size:
                scales[column] *= factors[vector + column]
            # Where a bound took the norm's place, the divisor is a constant.
            slopes[column] *= 0.0 if norm < eps else reciprocal * scales[column]
            if order == 2:
                slopes[column] *= reciprocal
            elif order != 1:
                peaks = _peaks(values, begin + column, length, inner, norm)
                slopes[column] /= max(peaks, 1)
        is_held = slopes[0] == 0.0 or _LEAST < abs(slopes[0]) < _LARGEST
        if inner == 1 and is_held and _LEAST < scales[0] < _LARGEST:
            scale, slope = as_computed(values, scales[0]), as_computed(values, slopes[0])
            _subtract(grad_output, values, gradient, begin, length, order, own_norms[0], scale, slope)
        elif inner == 1:
            _subtract(grad_output, values, gradient, begin, length, order, own_norms[0], scales[0], slopes[0])
        else:
            for at in range(begin, begin + length * inner, inner):
                _subtract_beside(grad_output, values, gradient, at, width, order, own_norms, scales, slopes)


@compiled
def _measure(
    grad_output: Any, values: Any, norms: Any, dots: Any, begin: int, length: int, inner: int, order: float
) -> None:
    if inner == 1:
        norms[0] = _norm(values, begin, length, order)
        dots[0] = _dot(grad_output, values, begin, length)
    else:
        _norms(values, norms, begin, length, inner, order)
        _dots(grad_output, values, dots, begin, length, inner)


@compiled
def _scale(values: Any, output: Any, begin: int, length: int, scale: float) -> None:
    for index in range(begin, begin + length):
        store(output, np.uintp(index), _narrow(values, load(values, np.uintp(index))) * scale)


@compiled
def _scale_beside(values: Any, output: Any, begin: int, width: int, scales: Any) -> None:
    for column in range(width):
        store(output, np.uintp(begin + column), _wide(values, begin + column) * scales[np.uintp(column)])


@compiled
def _subtract(
    grad_output: Any,
    values: Any,
    gradient: Any,
    begin: int,
    length: int,
    order: float,
    norm: float,
    scale: float,
    slope: float,
) -> None:
    if order == 2:
        for index in range(begin, begin + length):
            along = load(values, np.uintp(index)) * slope
            store(gradient, np.uintp(index), load(grad_output, np.uintp(index)) * scale - along)
        return
    for index in range(begin, begin + length):
        along = _slope(_wide(values, index), norm, order) * slope
        store(gradient, np.uintp(index), _wide(grad_output, index) * scale - along)


@compiled
def _subtract_beside(
    grad_output: Any,
    values: Any,
    gradient: Any,
    begin: int,
    width: int,
    order: float,
    norms: Any,
    scales: Any,
    slopes: Any,
) -> None:
    for column in range(width):
        own, index = np.uintp(column), begin + column
        value = _wide(values, index)
        along = (value if order == 2 else _slope(value, norms[own], order)) * slopes[own]
        store(gradient, np.uintp(index), _wide(grad_output, index) * scales[own] - along)


@compiled
def _slope(value: float, norm: float, order: float) -> float:
    """The derivative of the sum of magnitudes, or of the largest one."""
    return 0.0 if order != 1 and abs(value) != norm else np.sign(value)


@compiled
def _wide(values: Any, index: int) -> float:
    # Of an index that cannot be negative; one that can costs a branch, and the loop its vectors.
    value: float = np.float64(load(values, np.uintp(index)))
    return value


def _narrow(values: Any, number: Any) -> Any:
    """The number in float32, of which one product loses nothing that an output can hold; float64 for such values."""
    raise NotImplementedError


@overload(_narrow, strict=False)
def _narrow_number(values: Any, number: Any) -> Callable[[Any, Any], Any]:
    if values.dtype == types.float64:
        return lambda values, number: np.float64(number)
    return lambda values, number: np.float32(number)


@compiled
def _reciprocal(norm: float, eps: float) -> float:
    """0 for a vector of zeros."""
    return 0.0 if norm == 0 else 1.0 / max(norm, eps)


@compiled
def _norm(values: Any, begin: int, length: int, order: float) -> float:
    if order == 2:
        norm: float = np.sqrt(_dot(values, values, begin, length))
        return norm
    if order == 1:
        return _magnitude(values, begin, length)
    peak = 0.0
    for index in range(begin, begin + length):
        magnitude = abs(_wide(values, index))
        # NaN stays.
        peak = magnitude if magnitude > peak or magnitude != magnitude else peak
    return peak


@compiled_sum
def _dot(left: Any, right: Any, begin: int, length: int) -> float:
    total = 0.0
    for index in range(begin, begin + length):
        total += _wide(left, index) * _wide(right, index)
    return total


@compiled_sum
def _magnitude(values: Any, begin: int, length: int) -> float:
    total = 0.0
    for index in range(begin, begin + length):
        total += abs(_wide(values, index))
    return total


@compiled
def _norms(values: Any, norms: Any, begin: int, length: int, inner: int, order: float) -> None:
    if order == 2:
        _dots(values, values, norms, begin, length, inner)
        for column in range(norms.size):
            norms[column] = np.sqrt(norms[column])
        return
    norms[:] = 0.0
    for at in range(begin, begin + length * inner, inner):
        if order == 1:
            for column in range(norms.size):
                norms[column] += abs(_wide(values, at + column))
        else:
            for column in range(norms.size):
                magnitude, peak = abs(_wide(values, at + column)), norms[column]
                norms[column] = magnitude if magnitude > peak or magnitude != magnitude else peak


@compiled
def _dots(left: Any, right: Any, dots: Any, begin: int, length: int, inner: int) -> None:
    dots[:] = 0.0
    for at in range(begin, begin + length * inner, inner):
        for column in range(dots.size):
            dots[column] += _wide(left, at + column) * _wide(right, at + column)


@compiled
def _peaks(values: Any, begin: int, length: int, inner: int, norm: float) -> int:
    """How many values share the largest magnitude."""
    count = 0
    for row in range(length):
        count += abs(_wide(values, begin + row * inner)) == norm
    return count
