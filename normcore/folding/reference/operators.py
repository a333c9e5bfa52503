"""Operators that onnx.reference computes slowly, in float32, or with the semantics of another version.

The class names are the operators' names: onnx.reference finds the attributes' defaults by them.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_batch_normalization import BatchNormalization_14
from onnx.reference.ops.op_max_pool import MaxPool as SlowMaxPool
from onnx.reference.ops.op_resize import Resize as NewResize
from onnx.reference.ops.op_resize import _interpolate_nd, _linear_coeffs, _nearest_coeffs
from torch import Tensor
from torch.nn import functional

from normcore.folding.reference import pools, sampling
from normcore.folding.reference.window import Window, convolve, flat, tensor_of

Array = NDArray[Any]

_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_RESIZE_VERSION = 11  # before it, Resize was what Upsample is
_VALUE_AXIS_VERSION = 13  # before it, Softmax and its kin flattened their input at `axis`, 1 by default


class Conv(OpRun):
    def _run(self, x: Array, weight: Array, bias: Array | None = None, **attributes: Any) -> tuple[Array]:
        window = Window(x, weight.shape[2:], attributes)
        y = convolve(
            functional.pad(tensor_of(x), flat(window.pads)),
            tensor_of(weight),
            None if bias is None else tensor_of(bias),
            stride=window.strides,
            dilation=window.dilations,
            groups=attributes.get("group") or 1,
        )
        return (y.numpy(),)


class ConvTranspose(OpRun):
    def _run(self, x: Array, weight: Array, bias: Array | None = None, **attributes: Any) -> tuple[Array]:
        window = Window(x, weight.shape[2:], attributes)
        extra = list(attributes.get("output_padding") or [0] * window.rank)
        deconvolve = _TRANSPOSED[window.rank]
        y = deconvolve(
            tensor_of(x),
            tensor_of(weight),
            stride=window.strides,
            dilation=window.dilations,
            groups=attributes.get("group") or 1,
        )
        sizes = [size + more for size, more in zip(y.shape[2:], extra, strict=True)]
        crops = [
            (-begin, more - end)
            for more, (begin, end) in zip(extra, window.transposed_pads(sizes, attributes), strict=True)
        ]
        y = functional.pad(y, flat(crops))
        if bias is not None:
            y = y + tensor_of(bias).reshape(-1, *[1] * window.rank)
        return (y.numpy(),)


class MaxPool(OpRun):
    def _run(self, x: Array, **attributes: Any) -> tuple[Array, ...]:
        if len(self.output) > 1:  # with indices
            slow = SlowMaxPool(self.onnx_node, self.run_params)
            return tuple(slow.run(x))  # type: ignore[no-untyped-call]  # onnx leaves OpRun.run untyped
        window = Window(x, attributes["kernel_shape"], attributes)
        padded = functional.pad(tensor_of(x), flat(window.pads_to_fill()), value=float("-inf"))
        pool = _MAX_POOLS[window.rank]
        y = pool(padded, window.kernel, stride=window.strides, dilation=window.dilations)
        return (window.crop(y).numpy(),)


class AveragePool(OpRun):
    def _run(self, x: Array, **attributes: Any) -> tuple[Array]:
        window = Window(x, attributes["kernel_shape"], attributes)
        counted = torch.ones((1, 1, *x.shape[2:]), dtype=torch.float64)
        if attributes.get("count_include_pad"):
            counted = functional.pad(counted, flat(window.pads), value=1.0)
            counted = functional.pad(counted, flat(window.overhang()))
        else:
            counted = functional.pad(counted, flat(window.pads_to_fill()))
        rows = functional.pad(tensor_of(x), flat(window.pads_to_fill()))
        sums = self._sums(rows.reshape(-1, 1, *rows.shape[2:]), window)
        y = sums / self._sums(counted, window)
        return (window.crop(y.reshape(*x.shape[:2], *y.shape[2:])).numpy(),)

    @staticmethod
    def _sums(rows: Tensor, window: Window) -> Tensor:
        ones = torch.ones((1, 1, *window.kernel), dtype=torch.float64)
        return convolve(rows, ones, stride=window.strides, dilation=window.dilations)


class BatchNormalization(OpRun):
    """In inference mode in every opset: onnx.reference takes versions below 14 for training."""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, **attributes: Any
    ) -> tuple[Array, ...]:
        if attributes.get("training_mode"):
            training = BatchNormalization_14(self.onnx_node, self.run_params)
            outputs = training.run(x, scale, bias, mean, var)  # type: ignore[no-untyped-call]  # as above
            return tuple(outputs)
        if x.ndim > 1 and x.shape[1] != scale.size:  # numpy would repeat one channel, which no runtime does
            raise ValueError(f"{scale.size} channels to normalize, and {x.shape[1]} in the input")
        eps = attributes["epsilon"]
        scale, bias, mean, var = (tensor.reshape(-1, *[1] * (x.ndim - 2)) for tensor in (scale, bias, mean, var))
        return ((x - mean) / np.sqrt(var + eps) * scale + bias,)


class Erf(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (torch.special.erf(tensor_of(x)).numpy(),)


class Upsample(OpRun):
    """The predecessor of Resize; `scales` is an attribute in opset 7, then an input."""

    def _run(self, x: Array, scales: Any, mode: str = "nearest", **_: Any) -> tuple[Array]:
        return (_upsample(x, scales, mode),)


class Resize(NewResize):
    """As onnx.reference, which knows neither axes from the back nor the one form of opset 10, that of Upsample."""

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Array]:
        x, *others = inputs
        if self.run_params["opsets"][""] < _RESIZE_VERSION:
            return (_upsample(x, others[0], attributes["mode"]),)
        roi, scales, sizes = (*others, None, None, None)[:3]
        axes = attributes.pop("axes", None)
        chosen = None if axes is None else [int(axis) % x.ndim for axis in axes]
        resized: Array = super()._run(x, roi, scales, sizes, axes=chosen, **attributes)[0]
        return (resized,)


class _AlongAxis(OpRun):
    def _along(self, x: Array, function: Any) -> tuple[Array]:
        version = self.run_params["opsets"][""]
        given = [attribute.i for attribute in self.onnx_node.attribute if attribute.name == "axis"]
        if version >= _VALUE_AXIS_VERSION:
            return (function(x, given[0] if given else -1),)
        axis = (given[0] if given else 1) % (x.ndim or 1)
        rows = x.reshape(int(np.prod(x.shape[:axis])), -1)
        return (function(rows, 1).reshape(x.shape),)


class Softmax(_AlongAxis):
    def _run(self, x: Array, **_: Any) -> tuple[Array]:
        return self._along(x, lambda rows, axis: torch.softmax(tensor_of(rows), axis).numpy())


class LogSoftmax(_AlongAxis):
    def _run(self, x: Array, **_: Any) -> tuple[Array]:
        return self._along(x, lambda rows, axis: torch.log_softmax(tensor_of(rows), axis).numpy())


class Hardmax(_AlongAxis):
    def _run(self, x: Array, **_: Any) -> tuple[Array]:
        return self._along(x, _hardmax)


def _upsample(x: Array, scales: Any, mode: str) -> Array:
    """In asymmetric coordinates."""
    coefficients = _linear_coeffs if mode in ("linear", "bilinear") else _simple_coefficients
    factors = np.asarray(scales).tolist()
    return _interpolate_nd(x, coefficients, scale_factors=factors, coordinate_transformation_mode="asymmetric")


def _simple_coefficients(ratio: float, scale: float) -> Array:
    return np.asarray(_nearest_coeffs(ratio, "floor" if scale >= 1 else "ceil"))


def _hardmax(rows: Array, axis: int) -> Array:
    hard = np.zeros_like(rows)
    np.put_along_axis(hard, np.expand_dims(rows.argmax(axis), axis), 1, axis)
    return hard


OPERATORS: list[type[OpRun]] = [
    Conv,
    ConvTranspose,
    MaxPool,
    AveragePool,
    BatchNormalization,
    Erf,
    Upsample,
    Resize,
    Softmax,
    LogSoftmax,
    Hardmax,
    *pools.OPERATORS,
    *sampling.OPERATORS,
]
