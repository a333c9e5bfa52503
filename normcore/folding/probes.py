"""Seeded probe inputs for an ONNX graph: sizes for its free axes, values that make mistakes visible."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from normcore.errors import NormcoreError

KINDS = ("random", "impulse", "large offset", "random", "constant", "small")

_OFFSET = 10.0
_ROWS = 3
# Steps between the sizes of free axes: 32 suits networks that halve five times; odd sizes come later.
_STEPS = (32, 64, 16, 8, 5, 128, 2, 224)
_EQUAL_SIZES = (32, 64, 224, 1, 3)
_MAX_ATTEMPTS = 60
_MAX_ELEMENTS = 1 << 22
_DEFAULT_RANGE = 8
_UNKNOWN = frozenset({"", "?", "unk", "None"})

Feeds = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]
Sizes = dict[str, int]
Accept = Callable[[Feeds], str | None]


class NoProbeError(NormcoreError):
    """No probe can be made for a graph, or it accepts none; the message says why."""


@dataclass(frozen=True, slots=True)
class InputInfo:
    """One input: its numpy datatype, its axes (a size or the name of a free axis), and the bound of its integers."""

    name: str
    dtype: np.dtype[Any]
    axes: tuple[int | str, ...]
    bound: int


def read_inputs(model: ModelProto) -> tuple[InputInfo, ...]:
    """The inputs that a caller must feed.

    Raises:
        NoProbeError: an input is no tensor of numbers, or its rank is free.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    tables = _table_sizes(graph)
    return tuple(_read_input(info, tables) for info in graph.input if info.name not in constants)


def find_shapes(model: ModelProto, accept: Accept, *, seed: int) -> Shapes:
    """Small shapes that the graph accepts; free axes of different names get different sizes.

    Sizes differ from each other and, where the graph allows it, from the channel counts of its batch normalizations, so
    that two axes cannot be taken for one another. When a graph refuses all of them, equal sizes are tried.

    Args:
        model: the graph.
        accept: None when the graph runs on these inputs, else its reason.
        seed: of the values that are tried.

    Raises:
        NoProbeError: the graph refuses every size that was tried.
    """
    inputs = read_inputs(model)
    reason = None
    for shapes in itertools.islice(_candidates(inputs, model.graph), _MAX_ATTEMPTS):
        reason = accept(make_probe(inputs, shapes, kind="random", seed=seed))
        if reason is None:
            return shapes
    raise NoProbeError(f"the network accepts none of the input shapes that were tried; the last answer: {reason}")


def make_probe(inputs: tuple[InputInfo, ...], shapes: Mapping[str, tuple[int, ...]], *, kind: str, seed: int) -> Feeds:
    """Inputs of one kind; the same seed gives the same values."""
    generator = np.random.default_rng(seed)
    return {info.name: _values(info, shapes[info.name], kind, generator) for info in inputs}


def jitter(feeds: Feeds, *, seed: int) -> Feeds:
    """The same inputs moved by about a thousandth: other draws of the rounding errors, at the same conditioning."""
    generator = np.random.default_rng(seed)
    moved = {}
    for name, array in feeds.items():
        is_float = array.dtype.kind not in "biu"
        factor = 1 + 1e-3 * generator.normal(size=array.shape)
        moved[name] = (array.astype(np.float64) * factor).astype(array.dtype) if is_float else array
    return moved


def _read_input(info: ValueInfoProto, tables: dict[str, int]) -> InputInfo:
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type") or tensor.elem_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        raise NoProbeError(f"input {info.name}: probes are made for tensors of numbers only")
    if not tensor.HasField("shape"):
        raise NoProbeError(f"input {info.name}: the graph does not say its rank")
    axes: list[int | str] = []
    for index, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            axes.append(dim.dim_value)
        else:
            axes.append(f"{info.name}.{index}" if dim.dim_param in _UNKNOWN else dim.dim_param)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return InputInfo(info.name, dtype, tuple(axes), tables.get(info.name, _DEFAULT_RANGE))


def _table_sizes(graph: GraphProto) -> dict[str, int]:
    """Rows of the table that an input looks up with Gather, where it does."""
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    return {
        node.input[1]: rows[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in rows
    }


def _constant_sizes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            sizes.update((node.output[0], tuple(entry.t.dims)) for entry in node.attribute)
    return sizes


def _normalized_channels(graph: GraphProto) -> frozenset[int]:
    sizes = _constant_sizes(graph)
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    return frozenset(size for node in norms for size in sizes.get(node.input[1], ()))


def _fill(axes: tuple[int | str, ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)


def _candidates(inputs: tuple[InputInfo, ...], graph: GraphProto) -> Iterator[Shapes]:
    """Shapes worth a try, each once, the large ones left out unless the graph fixes them."""
    known = sorted({size for sizes in _constant_sizes(graph).values() for size in sizes})
    seen = set()
    for sizes in _assignments(inputs, _normalized_channels(graph), known):
        shapes = {info.name: _fill(info.axes, sizes) for info in inputs}
        key = tuple(shapes.values())
        is_large = sizes and max(math.prod(shape) for shape in key) > _MAX_ELEMENTS
        if key not in seen and not is_large:
            seen.add(key)
            yield shapes


def _assignments(inputs: tuple[InputInfo, ...], channels: frozenset[int], known: list[int]) -> Iterator[Sizes]:
    names = list(dict.fromkeys(axis for info in inputs for axis in info.axes if isinstance(axis, str)))
    batches = [name for name in names if any(info.axes[0] == name for info in inputs if info.axes)]
    others = [name for name in names if name not in batches]
    fixed = frozenset(axis for info in inputs for axis in info.axes if isinstance(axis, int))
    if not names:
        yield {}
        return
    for step, taken in itertools.product(_STEPS, (channels | fixed, frozenset[int]())):
        sizes = dict(zip(others, _distinct(len(others), step, step, taken), strict=True))
        rows = _distinct(len(batches), _ROWS, 1, taken | set(sizes.values()))
        yield sizes | dict(zip(batches, rows, strict=True))
        for row in (*rows[:1], 1):
            yield sizes | dict.fromkeys(batches, row)
    for size, row in itertools.product((*_EQUAL_SIZES, *known), (_ROWS, 1)):
        yield dict.fromkeys(others, size) | dict.fromkeys(batches, row)


def _distinct(count: int, start: int, step: int, taken: frozenset[int]) -> list[int]:
    return list(itertools.islice((size for size in itertools.count(start, step) if size not in taken), count))


def _values(info: InputInfo, shape: tuple[int, ...], kind: str, generator: np.random.Generator) -> NDArray[Any]:
    if info.dtype.kind == "b":
        return np.asarray(generator.random(shape) < 0.5)
    if info.dtype.kind in "iu":
        bound = 256 if info.dtype.name == "uint8" else info.bound
        return np.asarray(generator.integers(0, bound, shape)).astype(info.dtype)
    return _floats(shape, kind, generator).astype(info.dtype)


def _floats(shape: tuple[int, ...], kind: str, generator: np.random.Generator) -> NDArray[np.float64]:
    noise = np.asarray(generator.normal(size=shape))
    if kind == "large offset":
        return noise + _OFFSET
    if kind == "small":
        return noise / 10
    if len(shape) < 2 or 0 in shape:
        return noise
    if kind == "constant":
        return np.ones(shape) * noise[(slice(None), slice(None), *[slice(1)] * (len(shape) - 2))]
    if kind == "impulse":
        return _impulses(shape, generator)
    return noise


def _impulses(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    """Zeros with one peak per channel, each at a place of its own."""
    rows = np.zeros((shape[0] * shape[1], int(np.prod(shape[2:]))))
    places = generator.integers(0, rows.shape[1], len(rows))
    rows[np.arange(len(rows)), places] = generator.uniform(1, 4, len(rows)) * generator.choice([-1, 1], len(rows))
    return rows.reshape(shape)


__all__ = [
    "KINDS",
    "Feeds",
    "InputInfo",
    "NoProbeError",
    "Shapes",
    "find_shapes",
    "jitter",
    "make_probe",
    "read_inputs",
]
