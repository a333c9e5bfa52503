"""Operators that move elements: sampling at computed places, padding, and storage as integers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from torch.nn import functional

from normcore.folding.reference.window import tensor_of

Array = NDArray[Any]

_MODES = {"linear": "bilinear", "bilinear": "bilinear", "cubic": "bicubic", "bicubic": "bicubic", "nearest": "nearest"}


class GridSample(OpRun):
    def _run(
        self,
        x: Array,
        grid: Array,
        align_corners: int | None = None,
        mode: str | None = None,
        padding_mode: str | None = None,
    ) -> tuple[Array]:
        y = functional.grid_sample(
            tensor_of(x),
            tensor_of(grid),
            mode=_MODES[mode or "linear"],
            padding_mode=padding_mode or "zeros",
            align_corners=bool(align_corners),
        )
        return (y.numpy(),)


class Pad(OpRun):
    """Negative amounts crop, which onnx.reference cannot."""

    def _run(
        self,
        x: Array,
        pads: Any = None,
        value: Any = None,
        axes: Any = None,
        **attributes: Any,
    ) -> tuple[Array]:
        amounts = np.asarray(attributes.get("pads") if pads is None else pads).reshape(2, -1)
        mode: Any = attributes.get("mode") or "constant"
        fill = 0.0 if value is None else float(np.asarray(value).reshape(()))
        before, after = self._per_axis(x, amounts, axes)
        cropped = x[
            tuple(slice(max(0, -a), size + min(0, b)) for a, b, size in zip(before, after, x.shape, strict=True))
        ]
        widths = [(max(0, a), max(0, b)) for a, b in zip(before, after, strict=True)]
        if mode == "constant":
            return (np.pad(cropped, widths, constant_values=np.asarray(fill, x.dtype)),)
        return (np.pad(cropped, widths, mode=mode),)

    @staticmethod
    def _per_axis(x: Array, amounts: Array, axes: Any) -> tuple[list[int], list[int]]:
        chosen = range(x.ndim) if axes is None else [int(axis) % x.ndim for axis in np.asarray(axes)]
        found = np.zeros((2, x.ndim), dtype=np.int64)
        found[:, list(chosen)] = amounts
        return found[0].tolist(), found[1].tolist()


class QuantizeLinear(OpRun):
    def _run(self, x: Array, scale: Array, zero_point: Array | None = None, **attributes: Any) -> tuple[Array]:
        kind = np.dtype(np.uint8) if zero_point is None else zero_point.dtype
        bounds = np.iinfo(kind)
        steps = np.rint(x / _spread(scale, x, attributes))
        shifted = steps if zero_point is None else steps + _spread(zero_point, x, attributes)
        return (np.clip(shifted, bounds.min, bounds.max).astype(kind),)


class DequantizeLinear(OpRun):
    def _run(self, x: Array, scale: Array, zero_point: Array | None = None, **attributes: Any) -> tuple[Array]:
        steps = x.astype(np.float64)
        if zero_point is not None:
            steps = steps - _spread(zero_point, x, attributes)
        return (steps * _spread(scale, x, attributes),)


def _spread(values: Any, x: Array, attributes: dict[str, Any]) -> Array:
    """One number for all, one per place on an axis, or one per block of an axis, made to fit the tensor."""
    known = np.asarray(values)
    known = known.astype(np.float64)
    axis = attributes.get("axis")
    axis = (1 if axis is None else axis) % (x.ndim or 1)
    if known.size == 1:
        return known.reshape(())
    if known.ndim == 1:
        return known.reshape([-1 if index == axis else 1 for index in range(x.ndim)])
    return np.repeat(known, attributes["block_size"], axis=axis).take(range(x.shape[axis]), axis)


OPERATORS: list[type[OpRun]] = [GridSample, Pad, QuantizeLinear, DequantizeLinear]
