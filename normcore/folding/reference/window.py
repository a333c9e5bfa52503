"""The sliding window of convolutions and pools, and how it looks at a tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Array = NDArray[Any]
Pads = list[tuple[int, int]]

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Window:
    """The sliding window of a convolution or pool: kernel, strides, dilations and pads of every spatial axis."""

    def __init__(self, x: Array, kernel: Sequence[int], attributes: dict[str, Any]) -> None:
        self.rank = len(kernel)
        self.kernel = list(kernel)
        self.sizes = x.shape[2:]
        self.strides = list(attributes.get("strides") or [1] * self.rank)
        self.dilations = list(attributes.get("dilations") or [1] * self.rank)
        self.auto_pad = attributes.get("auto_pad") or "NOTSET"
        self.spans = [dilation * (size - 1) + 1 for dilation, size in zip(self.dilations, self.kernel, strict=True)]
        self.pads = self._pads(attributes.get("pads") or [0] * 2 * self.rank)
        self.ceil = bool(attributes.get("ceil_mode"))

    def pads_to_fill(self) -> Pads:
        """The pads, and behind them what the last window needs where the output's size is rounded up."""
        return [(begin, end + more) for (begin, end), (_, more) in zip(self.pads, self.overhang(), strict=True)]

    def overhang(self) -> Pads:
        sizes = zip(self._outputs(), self.strides, self.spans, self.sizes, self.pads, strict=True)
        return [(0, max(0, (out - 1) * stride + span - size - sum(pads))) for out, stride, span, size, pads in sizes]

    def crop(self, y: Tensor) -> Tensor:
        for axis, size in enumerate(self._outputs(), start=2):
            y = y.narrow(axis, 0, size)
        return y

    def transposed_pads(self, sizes: list[int], attributes: dict[str, Any]) -> Pads:
        """What a transposed convolution cuts off its full output of these sizes."""
        wanted = attributes.get("output_shape")
        if wanted is None and self.auto_pad.startswith("SAME"):
            wanted = [size * stride for size, stride in zip(self.sizes, self.strides, strict=True)]
        if wanted is None:
            return self.pads
        pads = []
        for size, out in zip(sizes, wanted[-self.rank :], strict=True):
            half, total = max(0, size - out) // 2, size - out
            begin = half if self.auto_pad == "SAME_UPPER" else max(0, total) - half
            pads.append((begin, total - begin))
        return pads

    def _pads(self, pads: Sequence[int]) -> Pads:
        if not self.auto_pad.startswith("SAME"):
            return list(zip(pads[: self.rank], pads[self.rank :], strict=True))
        same = []
        for size, stride, span in zip(self.sizes, self.strides, self.spans, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + span - size)
            half = total // 2
            same.append((half, total - half) if self.auto_pad == "SAME_UPPER" else (total - half, half))
        return same

    def _outputs(self) -> list[int]:
        outputs = []
        for size, stride, span, (begin, end) in zip(self.sizes, self.strides, self.spans, self.pads, strict=True):
            room = size + begin + end - span
            out = (-(-room // stride) if self.ceil else room // stride) + 1
            starts_behind_input = self.ceil and (out - 1) * stride >= size + begin
            outputs.append(out - 1 if starts_behind_input else out)
        return outputs


def tensor_of(array: Array) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def flat(pads: Pads) -> list[int]:
    """Pads in torch's order: the last axis first."""
    return [amount for pair in reversed(pads) for amount in pair]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Torch's convolution of this many spatial axes."""
    found: Tensor = _CONVOLUTIONS[x.ndim - 2](x, weight, bias, **options)
    return found
