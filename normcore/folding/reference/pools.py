"""Pools and normalizations over neighbourhoods, which onnx.reference lacks, computes slowly or computes wrongly."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from torch.nn import functional

from normcore.folding.reference.window import Window, convolve, flat, tensor_of

Array = NDArray[Any]


class LpPool(OpRun):
    def _run(self, x: Array, **attributes: Any) -> tuple[Array]:
        p = attributes.get("p") or 2
        window = Window(x, attributes["kernel_shape"], attributes)
        powers = functional.pad(tensor_of(x).abs() ** p, flat(window.pads_to_fill()))
        ones = torch.ones((1, 1, *window.kernel), dtype=torch.float64)
        rows = powers.reshape(-1, 1, *powers.shape[2:])
        sums = convolve(rows, ones, stride=window.strides, dilation=window.dilations)
        y = sums.clamp(min=0) ** (1 / p)
        return (window.crop(y.reshape(*x.shape[:2], *y.shape[2:])).numpy(),)


class GlobalLpPool(OpRun):
    def _run(self, x: Array, p: int | None = None) -> tuple[Array]:
        order = p or 2
        return ((np.abs(x) ** order).sum(tuple(range(2, x.ndim)), keepdims=True) ** (1 / order),)


class GlobalMaxPool(OpRun):
    """onnx.reference loses an axis of volumes."""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.max(tuple(range(2, x.ndim)), keepdims=True),)


class LRN(OpRun):
    """onnx.reference counts samples where it should count channels."""

    def _run(self, x: Array, alpha: float, beta: float, bias: float, size: int) -> tuple[Array]:
        before, channels = (size - 1) // 2, x.shape[1]
        squares = np.stack(
            [
                (x[:, max(0, channel - before) : channel - before + size] ** 2).sum(axis=1)
                for channel in range(channels)
            ],
            axis=1,
        )
        return (x / (bias + alpha / size * squares) ** beta,)


class MeanVarianceNormalization(OpRun):
    def _run(self, x: Array, axes: list[int] | None = None) -> tuple[Array]:
        over = tuple(axes or (0, 2, 3))
        centred = x - x.mean(over, keepdims=True)
        return (centred / np.sqrt((centred**2).mean(over, keepdims=True) + 1e-9),)


class LpNormalization(OpRun):
    """onnx.reference sums odd powers with their signs."""

    def _run(self, x: Array, axis: int | None = None, p: int | None = None) -> tuple[Array]:
        order = p or 2
        over = -1 if axis is None else axis
        norm = (np.abs(x) ** order).sum(over, keepdims=True) ** (1 / order)
        return (np.divide(x, norm, out=np.zeros_like(x), where=norm != 0),)


OPERATORS: list[type[OpRun]] = [LpPool, GlobalLpPool, GlobalMaxPool, LRN, MeanVarianceNormalization, LpNormalization]
