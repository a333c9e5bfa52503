"""Networks beside what a correct fold makes of them, written from the formulas: no rule of the product is used.

Every pair takes the eps that the fold believes in, so that a wrong one makes a mutant.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from tests.normcore.folding.networks import Builder

Array = NDArray[Any]
EPS = 1e-3


class Pair(NamedTuple):
    """The two networks; `weight` and `bias` are constants of the folded one, its output channels on `axis`."""

    original: ModelProto
    folded: ModelProto
    weight: str
    axis: int
    bias: str | None


Make = Callable[[int, Any, float], Pair]


class Sides:
    """Builds both networks; constants that both need are drawn once."""

    def __init__(self, seed: int, dtype: Any) -> None:
        self.original, self.folded = Builder(seed, dtype=dtype), Builder(seed, dtype=dtype)
        self.normal = self.original.generator.normal

    def both(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.folded.add(operator, inputs, output, **attributes)
        return self.original.add(operator, inputs, output, **attributes)

    def constant(self, name: str, values: Any) -> tuple[str, Array]:
        """In both; and the values as they are stored, in float64."""
        self.original.constant(name, values)
        self.folded.constant(name, values)
        return name, np.asarray(values).astype(self.original.dtype).astype(np.float64)

    def norm(self, x: str, channels: int, output: str, eps: float) -> tuple[Array, Array]:
        """In the original only; its scale and shift."""
        self.original.normalization(x, channels, output, eps=EPS)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.original.initializers}
        roles = ("weight", "bias", "mean", "var")
        weight, bias, mean, var = (stored[f"{output}.{role}"].astype(np.float64) for role in roles)
        scale = weight / np.sqrt(var + eps)
        return scale, bias - mean * scale

    def pair(self, shape: list[Any], *, weight: str = "w", axis: int = 0, bias: str | None = "b") -> Pair:
        return Pair(self.original.model("y", shape), self.folded.model("y", shape), weight, axis, bias)


def forward(seed: int, dtype: Any, eps: float) -> Pair:
    """Norm -> grouped convolution without padding."""
    sides = Sides(seed, dtype)
    scale, shift = sides.norm("x", 6, "norm", eps)
    values = sides.normal(size=(4, 3, 3, 3)) / 5
    sides.original.add("Conv", ["norm", sides.original.constant("w", values)], "conv", group=2)
    exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
    per_group = np.repeat(scale.reshape(2, 3), 2, axis=0), np.repeat(shift.reshape(2, 3), 2, axis=0)
    weight = sides.folded.constant("w", exact * per_group[0][..., None, None])
    bias = sides.folded.constant("b", np.einsum("oikl,oi->o", exact, per_group[1]))
    sides.folded.add("Conv", ["x", weight, bias], "conv", group=2)
    sides.both("Relu", ["conv"], "y")
    return sides.pair(["n", 6, "h", "w"])


def forward_to_all(seed: int, dtype: Any, eps: float) -> Pair:
    """Norm -> two 1x1 convolutions that both read it, joined."""
    sides = Sides(seed, dtype)
    scale, shift = sides.norm("x", 3, "norm", eps)
    for name, suffix in (("left", ""), ("right", "2")):
        weight = sides.original.constant(f"w{suffix}", sides.normal(size=(4, 3, 1, 1)))
        exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
        sides.original.add("Conv", ["norm", weight], name)
        weight = sides.folded.constant(f"w{suffix}", exact * scale[:, None, None])
        bias = sides.folded.constant(f"b{suffix}", np.einsum("oikl,i->o", exact, shift))
        sides.folded.add("Conv", ["x", weight, bias], name)
    sides.both("Concat", ["left", "right"], "y", axis=1)
    return sides.pair(["n", 3, "h", "w"], weight="w2", bias="b2")


def forward_through_pool(seed: int, dtype: Any, eps: float) -> Pair:
    """Norm -> global average -> flatten -> Gemm: the tensors in between change their values, and so their names."""
    sides = Sides(seed, dtype)
    scale, shift = sides.norm("x", 5, "norm", eps)
    for build, start, prefix in ((sides.original, "norm", ""), (sides.folded, "x", "plain_")):
        build.add("GlobalAveragePool", [start], f"{prefix}pooled")
        build.add("Flatten", [f"{prefix}pooled"], f"{prefix}flat")
    weight = sides.original.constant("w", sides.normal(size=(4, 5)))
    exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
    sides.original.add("Gemm", ["flat", weight], "product", transB=1)
    weight = sides.folded.constant("w", exact * scale)
    sides.folded.add("Gemm", ["plain_flat", weight, sides.folded.constant("b", exact @ shift)], "product", transB=1)
    sides.both("Softmax", ["product"], "y")
    return sides.pair(["n", 5, "h", "w"])


def forward_padded_map(seed: int, dtype: Any, eps: float) -> Pair:
    """Norm -> convolution with zero padding at a fixed size: the shift becomes a map of positions."""
    sides = Sides(seed, dtype)
    scale, shift = sides.norm("x", 3, "norm", eps)
    weight = sides.original.constant("w", sides.normal(size=(4, 3, 3, 3)) / 4)
    exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
    sides.original.add("Conv", ["norm", weight], "conv", pads=[1, 1, 1, 1])
    padded = np.pad(np.broadcast_to(shift[:, None, None], (3, 7, 9)), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    bias = sides.folded.constant("b", np.einsum("oikl,ihwkl->ohw", exact, windows)[None])
    weight = sides.folded.constant("w", exact * scale[:, None, None])
    sides.folded.add("Conv", ["x", weight], "without_shift", pads=[1, 1, 1, 1])
    sides.folded.add("Add", ["without_shift", bias], "conv")
    sides.both("Relu", ["conv"], "y")
    return sides.pair(["n", 3, 7, 9])


def forward_padded_constant(seed: int, dtype: Any, eps: float) -> Pair:
    """Norm -> convolution with zero padding: x + shift / scale is padded by zeros, and the scale is in the weight."""
    sides = Sides(seed, dtype)
    scale, shift = sides.norm("x", 3, "norm", eps)
    weight = sides.original.constant("w", sides.normal(size=(4, 3, 3, 3)) / 4)
    exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
    sides.original.add("Conv", ["norm", weight], "conv", pads=[1, 1, 1, 1], strides=[2, 2])
    bias = sides.folded.constant("b", (shift / scale).reshape(1, -1, 1, 1))
    sides.folded.add("Add", ["x", bias], "shifted")
    weight = sides.folded.constant("w", exact * scale[:, None, None])
    sides.folded.add("Conv", ["shifted", weight], "conv", pads=[1, 1, 1, 1], strides=[2, 2])
    sides.both("Sigmoid", ["conv"], "y")
    return sides.pair(["n", 3, "h", "w"])


def merged_norms(seed: int, dtype: Any, eps: float) -> Pair:
    """Norm -> norm becomes one multiplication and one addition."""
    sides = Sides(seed, dtype)
    sides.both("Sigmoid", ["x"], "bounded")
    first = sides.norm("bounded", 4, "first", EPS)
    second = sides.norm("first", 4, "second", eps)
    weight = sides.folded.constant("w", (second[0] * first[0]).reshape(-1, 1, 1))
    bias = sides.folded.constant("b", (second[0] * first[1] + second[1]).reshape(-1, 1, 1))
    sides.folded.add("Mul", ["bounded", weight], "scaled")
    sides.folded.add("Add", ["scaled", bias], "second")
    sides.both("Relu", ["second"], "y")
    return sides.pair(["n", 4, "h", "w"])


def branches(seed: int, dtype: Any, eps: float) -> Pair:
    """3x3 convolution, 1x1 convolution and identity, each with its norm, summed: one convolution."""
    sides = Sides(seed, dtype)
    kernels = np.zeros((3, 4, 4, 3, 3))
    for index, (name, size) in enumerate((("wide", 3), ("narrow", 1))):
        weight = sides.original.constant(f"{name}.weight", sides.normal(size=(4, 4, size, size)) / 4)
        margin = (3 - size) // 2
        exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
        kernels[index, :, :, margin : 3 - margin, margin : 3 - margin] = exact
        sides.original.add("Conv", ["x", weight], name, pads=[1 - margin] * 4)
    kernels[2, range(4), range(4), 1, 1] = 1
    found = [sides.norm(*each) for each in (("wide", 4, "n1", eps), ("narrow", 4, "n2", EPS), ("x", 4, "n3", EPS))]
    sides.original.add("Add", ["n1", "n2"], "some")
    sides.original.add("Add", ["some", "n3"], "all")
    weight = sides.folded.constant(
        "w", sum(kernels[index] * found[index][0].reshape(-1, 1, 1, 1) for index in range(3))
    )
    bias = sides.folded.constant("b", sum(shift for _, shift in found))
    sides.folded.add("Conv", ["x", weight, bias], "all", pads=[1, 1, 1, 1])
    sides.both("Relu", ["all"], "y")
    return sides.pair(["n", 4, "h", "w"])


def through_pool(seed: int, dtype: Any, eps: float) -> Pair:
    """Convolution -> average pool -> norm, folded back through the pool."""
    sides = Sides(seed, dtype)
    weight = sides.original.constant("w", sides.normal(size=(4, 3, 3, 3)) / 4)
    exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
    sides.original.add("Conv", ["x", weight], "conv")
    sides.original.add("AveragePool", ["conv"], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    scale, shift = sides.norm("pooled", 4, "norm", eps)
    weight = sides.folded.constant("w", exact * scale.reshape(-1, 1, 1, 1))
    sides.folded.add("Conv", ["x", weight, sides.folded.constant("b", shift)], "scaled")
    sides.folded.add("AveragePool", ["scaled"], "norm", kernel_shape=[2, 2], strides=[2, 2])
    sides.both("Relu", ["norm"], "y")
    return sides.pair(["n", 3, "h", "w"])


def transposed_product(seed: int, dtype: Any, eps: float) -> Pair:
    """(N, L, C) MatMul -> transpose -> norm over axis 1."""
    sides = Sides(seed, dtype)
    weight = sides.original.constant("w", sides.normal(size=(4, 6)) / 2)
    exact = numpy_helper.to_array(sides.original.initializers[-1]).astype(np.float64)
    sides.original.add("MatMul", ["x", weight], "product")
    sides.original.add("Transpose", ["product"], "turned", perm=[0, 2, 1])
    scale, shift = sides.norm("turned", 6, "norm", eps)
    sides.folded.add("MatMul", ["x", sides.folded.constant("w", exact * scale)], "scaled")
    sides.folded.add("Add", ["scaled", sides.folded.constant("b", shift)], "moved")
    sides.folded.add("Transpose", ["moved"], "norm", perm=[0, 2, 1])
    sides.both("Tanh", ["norm"], "y")
    return sides.pair(["n", "l", 4], axis=1)


PAIRS: dict[str, Make] = {
    make.__name__: make
    for make in (
        forward,
        forward_to_all,
        forward_through_pool,
        forward_padded_map,
        forward_padded_constant,
        merged_norms,
        branches,
        through_pool,
        transposed_product,
    )
}
