"""Random networks of any rank: every operator that a fold looks at or through, on sizes that agree by accident."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto

from tests.normcore.folding.builder import Net

SIZES = [1, 2, 2, 3, 4, 4, 6]
MAX_ELEMENTS = 2048
Shape = tuple[int, ...]
Tensor = tuple[str, Shape]


@dataclass
class Drawing:
    """A network under construction, and the choices of hypothesis."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    net: Net
    overridable: list[str] = field(default_factory=list)

    def one(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def rarely(self) -> bool:
        return bool(self.draw(st.integers(0, 7)) == 7)

    def weight(self, *shape: int, positive: bool = False, fan: int = 1) -> str:
        """A constant, sometimes equal everywhere, sometimes behind a chain, sometimes a default alone."""
        values = self.net.generator.standard_normal(shape) / math.sqrt(max(fan, 1))
        values = np.abs(values) + 0.5 if positive else values
        values = np.full(shape, values.reshape(-1)[0]) if self.rarely() and values.size else values
        name = self.net.constant(values.astype(self.net.dtype))
        if self.rarely():
            return self.net.op("Identity", name)
        if self.rarely() and self.rarely():
            self.overridable.append(name)
        return name

    def ints(self, *values: int) -> str:
        return self.net.constant(np.array(values, np.int64))


def norm(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    if d.rarely():
        vectors = [np.full(shape[1], value, d.net.dtype) for value in (1.5, 0.3, -0.2, 2.0)]
        return d.net.op("BatchNormalization", name, *map(d.net.constant, vectors)), shape
    return d.net.norm(name, shape[1]), shape


def elementwise(d: Drawing, x: Tensor) -> Tensor:
    """By a constant that fits, repeats an axis of size 1, or has more axes than the tensor."""
    name, shape = x
    rank = d.one(*range(len(shape) + 1), len(shape), len(shape) + d.rarely())
    sizes = [1] * max(0, rank - len(shape)) + list(shape[max(0, len(shape) - rank) :])
    sizes = [d.one(1, 1, size, size) if size > 1 else (d.one(*SIZES) if d.rarely() else 1) for size in sizes]
    operator = d.one("Add", "Sub", "Mul", "Div")
    operands = [name, d.weight(*sizes, positive=operator == "Div")]
    swapped = operator != "Div" and d.one(False, True)
    return d.net.op(operator, *(operands[::-1] if swapped else operands)), np.broadcast_shapes(shape, tuple(sizes))


def convolution(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    rank = len(shape) - 2
    groups = d.one(1, 1, *(each for each in (2, 3, shape[1]) if shape[1] % each == 0))
    made = groups * d.one(1, 2, 3)
    kernel = [d.one(1, min(3, size)) for size in shape[2:]]
    pads = [d.one(0, size // 2) for size in kernel] + [d.one(0, size // 2) for size in kernel]
    bias = [d.weight(made)] if d.one(False, True) else []
    if d.one(False, False, True):
        weight = d.weight(shape[1], made // groups, *kernel, fan=shape[1] // groups)
        attributes: dict[str, Any] = {"group": groups, "strides": [d.one(1, 1, 2)] * rank}
        sizes = [(size - 1) * attributes["strides"][0] + tap for size, tap in zip(shape[2:], kernel, strict=True)]
        return d.net.op("ConvTranspose", name, weight, *bias, **attributes), (shape[0], made, *sizes)
    weight = d.weight(made, shape[1] // groups, *kernel, fan=shape[1] // groups)
    sizes = [size + pads[axis] + pads[axis + rank] - kernel[axis] + 1 for axis, size in enumerate(shape[2:])]
    return d.net.op("Conv", name, weight, *bias, group=groups, pads=pads), (shape[0], made, *sizes)


def gemm(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    trans_a, trans_b = d.one(0, 0, 1), d.one(0, 1)
    rows, features = shape[::-1] if trans_a else shape
    made = d.one(*SIZES)
    addend = d.one(None, (), (made,), (1, made), (rows, 1), (rows, made))
    weight = d.weight(*((made, features) if trans_b else (features, made)), fan=features)
    operands = [weight] if addend is None else [weight, d.weight(*addend)]
    attributes = {"transA": trans_a, "transB": trans_b, "alpha": d.one(1.0, 0.5), "beta": d.one(1.0, 2.0)}
    return d.net.op("Gemm", name, *operands, **attributes), (rows, made)


def product(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    made = d.one(*SIZES)
    if d.rarely():
        return d.net.op("MatMul", d.weight(made, shape[-2], fan=shape[-2]), name), (*shape[:-2], made, shape[-1])
    result = d.net.op("MatMul", name, d.weight(shape[-1], made, fan=shape[-1]))
    return (d.net.op("Add", result, d.weight(made)) if d.one(False, True) else result), (*shape[:-1], made)


def transpose(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    order = d.draw(st.permutations(range(len(shape))))
    if d.rarely():
        return d.net.op("Transpose", name), shape[::-1]
    return d.net.op("Transpose", name, perm=order), tuple(shape[axis] for axis in order)


def reshape(d: Drawing, x: Tensor) -> Tensor:
    """Axes joined and cut apart; sizes named, copied (0), left over (-1), or read from the tensor itself."""
    name, shape = x
    if d.rarely():
        return d.net.op("Reshape", name, d.net.op("Shape", name)), shape
    if d.rarely():
        axis = d.one(*range(len(shape) + 1))
        return d.net.op("Flatten", name, axis=axis), (math.prod(shape[:axis]), math.prod(shape[axis:]))
    sizes = list(shape)
    for _ in range(d.one(1, 1, 2)):
        axis = d.one(*range(len(sizes)))
        factors = [each for each in (1, 2, 3) if sizes[axis] % each == 0]
        if d.one(False, True) and axis + 1 < len(sizes):
            sizes[axis : axis + 2] = [sizes[axis] * sizes[axis + 1]]
        elif len(sizes) < 5:
            factor = d.one(*factors)
            sizes[axis : axis + 1] = d.one([factor, sizes[axis] // factor], [sizes[axis] // factor, factor])
    written = [
        0 if axis < len(shape) and shape[axis] == size and d.one(False, True) else size
        for axis, size in enumerate(sizes)
    ]
    if d.one(False, True):
        written[d.one(*range(len(written)))] = -1
    return d.net.op("Reshape", name, d.ints(*written)), tuple(sizes)


def unsqueeze(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    axis = d.one(*range(len(shape) + 1))
    return d.net.op("Unsqueeze", name, d.ints(axis)), (*shape[:axis], 1, *shape[axis:])


def squeeze(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    if d.rarely():
        return d.net.op("Squeeze", name), tuple(size for size in shape if size != 1)
    axis = d.one(*ones)
    return d.net.op("Squeeze", name, d.ints(axis - d.one(0, len(shape)))), (*shape[:axis], *shape[axis + 1 :])


def pool(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    rank = len(shape) - 2
    operator = d.one("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")
    if operator.startswith("Global"):
        return d.net.op(operator, name), (*shape[:2], *[1] * rank)
    pads = [d.one(0, 1) for _ in range(rank)] + [0] * rank
    counts = {"count_include_pad": d.one(0, 1)} if operator == "AveragePool" else {}
    sizes = [size + pad - 1 for size, pad in zip(shape[2:], pads, strict=False)]
    return d.net.op(operator, name, kernel_shape=[2] * rank, pads=pads, **counts), (*shape[:2], *sizes)


def reduction(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    axes = sorted(d.draw(st.sets(st.sampled_from(range(len(shape))), min_size=1, max_size=2)))
    keeps = d.one(0, 1)
    written = [axis - d.one(0, len(shape)) for axis in axes]
    left = tuple(1 if axis in axes else size for axis, size in enumerate(shape) if keeps or axis not in axes)
    return d.net.op(d.one("ReduceMean", "ReduceMax"), name, axes=written, keepdims=keeps), left


def resize(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    scales = [d.one(1, 1, 2) for _ in shape]
    sizes = tuple(size * scale for size, scale in zip(shape, scales, strict=True))
    mode = {"mode": d.one("nearest", "linear"), "coordinate_transformation_mode": d.one("asymmetric", "half_pixel")}
    if d.one(False, True):
        return d.net.op("Resize", name, "", "", d.ints(*sizes), **mode), sizes
    return d.net.op("Resize", name, "", d.net.constant(np.array(scales, np.float32)), **mode), sizes


def pad(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    widths = [d.one(0, 0, 1) for _ in range(2 * len(shape))]
    sizes = tuple(size + widths[axis] + widths[axis + len(shape)] for axis, size in enumerate(shape))
    return d.net.op("Pad", name, d.ints(*widths), mode=d.one("constant", "edge")), sizes


def cut(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    axis = d.one(*(each for each, size in enumerate(shape) if size > 1))
    size = shape[axis]
    if d.one(False, True):
        start, step = d.one(0, 1), d.one(1, 1, 2)
        kept = (*shape[:axis], len(range(start, size, step)), *shape[axis + 1 :])
        return d.net.op("Slice", name, *(d.ints(each) for each in (start, 2**40, axis, step))), kept
    if d.rarely():
        parts = d.ints(-1), d.ints(-(2**40)), d.ints(axis), d.ints(-1)
        return d.net.op("Slice", name, *parts), shape
    first = d.one(*range(1, size))
    front = d.net.op("Split", name, d.ints(first, size - first), axis=axis)
    back = f"{front}_back"
    d.net.nodes[-1].output.append(back)
    kept, taken = d.one((front, first), (back, size - first))
    return kept, (*shape[:axis], taken, *shape[axis + 1 :])


def shuffle(d: Drawing, x: Tensor) -> Tensor:
    name, (rows, channels, height, width) = x
    if channels % 4 == 0 and d.one(False, True):
        shape = (rows, channels // 4, height * 2, width * 2)
        return d.net.op("DepthToSpace", name, blocksize=2, mode=d.one("DCR", "CRD")), shape
    if height % 2 == 0 and width % 2 == 0:
        return d.net.op("SpaceToDepth", name, blocksize=2), (rows, channels * 4, height // 2, width // 2)
    return x


def activation(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    operator = d.one("Relu", "LeakyRelu", "PRelu", "Tanh", "Identity", "Dropout")
    slope = [d.weight(*(d.one(1, size) for size in shape[1:]))] if operator == "PRelu" else []
    return d.net.op(operator, name, *slope), shape


def casts(d: Drawing, x: Tensor) -> Tensor:
    wide = TensorProto.DOUBLE if d.net.dtype == np.float64 else TensorProto.FLOAT
    return d.net.op("Cast", d.net.op("Cast", x[0], to=TensorProto.DOUBLE), to=wide), x[1]


def join(d: Drawing, x: Tensor) -> Tensor:
    """Two ways from one tensor, added up or concatenated where their shapes allow that."""
    ways = [x, x]
    for index in range(2):
        for _ in range(d.one(0, 1, 1, 2)):
            ways[index] = step(d, ways[index])
    (left, mine), (right, theirs) = ways
    operator = d.one("Add", "Sub", "Sum", "Mul", "Concat", "Concat")
    if operator == "Concat":
        axes = [
            axis
            for axis in range(len(mine))
            if len(mine) == len(theirs) and mine[:axis] + mine[axis + 1 :] == theirs[:axis] + theirs[axis + 1 :]
        ]
        if axes:
            axis = d.one(*axes)
            whole = (*mine[:axis], mine[axis] + theirs[axis], *mine[axis + 1 :])
            return d.net.op("Concat", left, right, axis=axis - d.one(0, len(mine))), whole
        return ways[0]
    try:
        whole = np.broadcast_shapes(mine, theirs)
    except ValueError:
        return ways[0]
    return d.net.op(operator, left, right), whole


def gain(d: Drawing, x: Tensor) -> Tensor:
    name, shape = x
    if len(shape) > 2 and d.one(False, True):
        return d.net.op("InstanceNormalization", name, d.weight(shape[1]), d.weight(shape[1]), epsilon=0.1), shape
    return d.net.op("LayerNormalization", name, d.weight(shape[-1]), d.weight(shape[-1]), epsilon=0.1), shape


STEPS: list[tuple[Callable[[Drawing, Tensor], Tensor], Callable[[Shape], bool]]] = [
    *[(norm, lambda shape: len(shape) > 1)] * 4,
    *[(elementwise, lambda shape: True)] * 3,
    *[(convolution, lambda shape: 3 <= len(shape) <= 5 and shape[1] > 0)] * 8,
    *[(gemm, lambda shape: len(shape) == 2)] * 6,
    *[(product, lambda shape: len(shape) > 1)] * 3,
    *[(reshape, lambda shape: len(shape) > 0)] * 2,
    (transpose, lambda shape: len(shape) > 1),
    (unsqueeze, lambda shape: len(shape) < 5),
    (squeeze, lambda shape: 1 in shape),
    (pool, lambda shape: 3 <= len(shape) <= 5 and min(shape[2:]) > 1),
    (reduction, lambda shape: len(shape) > 2),
    (resize, lambda shape: len(shape) > 2),
    (pad, lambda shape: len(shape) > 0),
    (cut, lambda shape: max(shape, default=0) > 1),
    (shuffle, lambda shape: len(shape) == 4),
    (activation, lambda shape: len(shape) > 0),
    (casts, lambda shape: True),
    *[(join, lambda shape: True)] * 2,
    (gain, lambda shape: len(shape) > 1),
]


def step(d: Drawing, x: Tensor) -> Tensor:
    makes = d.one(*(make for make, fits in STEPS if fits(x[1])))
    made: Tensor = makes(d, x)
    return made if math.prod(made[1]) <= MAX_ELEMENTS else x


@dataclass(frozen=True)
class Case:
    """A network, and the shapes that it may be called with."""

    model: ModelProto
    shapes: list[Shape]
    overridable: dict[str, np.ndarray]


@st.composite
def networks_of_any_rank(draw: Callable[[st.SearchStrategy[Any]], Any], dtype: Any = np.float64) -> Case:
    d = Drawing(draw, Net(seed=draw(st.integers(0, 999)), dtype=dtype))
    shape = tuple(d.one(*SIZES) for _ in range(d.one(2, 3, 3, 4, 4, 5)))
    x: Tensor = ("x", shape)
    for _ in range(draw(st.integers(2, 8))):
        x = step(d, x)
    if len(x[1]) > 1 and d.one(False, True):
        x = step(d, norm(d, x))
    outputs = [d.net.op("Identity", x[0])]
    if d.rarely():
        outputs += [d.one(*(node.output[0] for node in d.net.nodes[:-1]))]
    declared = [f"axis{axis}" if d.one(False, False, True) else size for axis, size in enumerate(shape)]
    others = [tuple(size if isinstance(size, int) else d.one(*SIZES) for size in declared) for _ in range(3)]
    overridable = sorted({name for name in d.overridable if name in d.net.initializers})
    model = d.net.model({"x": declared}, *dict.fromkeys(outputs), overridable=overridable)
    replaced = {name: d.net.generator.standard_normal(list(d.net.initializers[name].dims)) for name in overridable}
    return Case(model, [shape, *others], replaced)
