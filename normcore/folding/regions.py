"""The proof of each fold by itself: every part of the graph that was rewritten.

The folded graph is evaluated in float64 from the original's tensors where such a part begins. So every difference at
its end is the work of what was rewritten there. It may be what rounding the stored weights does, and that is measured:
the same evaluation with every stored weight moved by half a unit in its last place, a few times, channel by channel,
with each channel's mean and without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from normcore.folding.comparison import epsilon, is_float, largest, same_infinities
from normcore.folding.extents import Extent
from normcore.folding.probes import Feeds
from normcore.folding.reference import Reference
from normcore.folding.report import Region

Array = NDArray[Any]

_DRAWS = 4  # of the weights' rounding, per probe
_FACTOR = 3.0
_ULPS = 0.5
_FOLDED_IN_FLOAT32 = 2e-6  # of the channel: what a fold computed in float32 may add
_FLOOR = 1e-12  # of the tensor: float64 itself
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# fmt: off
_ELEMENTWISE = frozenset((
    "Add", "Sub", "Mul", "Div", "BatchNormalization", "LayerNormalization", "RMSNormalization", "GroupNormalization",
    "InstanceNormalization", "PRelu", "Where", "Pad", "Sum", "Concat",
))
_PASSING = frozenset((
    "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Expand", "Tile", "Slice",
))
# fmt: on
_COMPUTED = "//computed"


class RegionProof:
    """Compares the rewritten parts of two graphs, probe by probe."""

    def __init__(self, original: Reference, folded: ModelProto, extents: Sequence[Extent], *, seed: int) -> None:
        self._original = original
        self._extents = list(extents)
        self._errors = {extent.output: _Pool() for extent in extents}
        computed = {name for node in folded.graph.node for name in node.output}
        begins = {name for extent in extents for name in extent.inputs}
        self._given = sorted(begins & computed)
        forced = _force(folded, {*self._given, *self._errors})
        self._folded = Reference(forced)
        generator = np.random.default_rng(seed)
        stored = _stored_weights(forced)
        self._eps = max((_eps(tensor) for tensor in stored), default=float(np.finfo(np.float32).eps))
        self._moved = [self._folded.with_constants(_moved(stored, generator)) for _ in range(_DRAWS)]

    def add(self, feeds: Feeds, *, deadline: float) -> None:
        """Evaluate one more probe."""
        expected = self._original.run(feeds, {*self._given, *self._errors}, deadline=deadline)
        names = [name + _COMPUTED for name in self._errors]
        given = {**feeds, **{name: expected[name] for name in self._given}}
        computed = self._folded.run(given, names, deadline=deadline)
        moved = [reference.run(given, names, deadline=deadline) for reference in self._moved]
        for name, pool in self._errors.items():
            key = name + _COMPUTED
            pool.add(expected[name], computed[key], [values[key] for values in moved])

    def regions(self) -> tuple[Region, ...]:
        return tuple(self._errors[extent.output].region(extent, self._eps) for extent in self._extents)


@dataclass(slots=True)
class _Pool:
    """Per channel, with its mean and without, the largest error, noise and element over all probes."""

    error: Array | float = 0.0
    noise: Array | float = 0.0
    scale: Array | float = 0.0
    comparable: bool = True

    def add(self, expected: Array, computed: Array, moved: list[Array]) -> None:
        is_same_kind = expected.shape == computed.shape and is_float(expected) == is_float(computed)
        if not is_same_kind or not same_infinities(expected, computed):
            self.comparable = False
            return
        if not is_float(expected):
            self.comparable &= np.array_equal(expected, computed)
            return
        finite = np.isfinite(expected)
        self.error = np.maximum(self.error, _per_channel(computed - expected, finite))
        self.scale = np.maximum(self.scale, _per_channel(expected, finite))
        for values in moved:
            self.noise = np.maximum(self.noise, _per_channel(values - computed, finite))

    def region(self, extent: Extent, eps: float) -> Region:
        scale = largest(np.asarray(self.scale))
        relative = max(_ULPS * eps, _FOLDED_IN_FLOAT32)
        bound = _FACTOR * self.noise + relative * self.scale + _FLOOR * scale
        return Region(
            output=extent.output,
            error=largest(np.asarray(self.error)) if self.comparable else float("inf"),
            scale=scale,
            equivalent=self.comparable and bool(np.all(self.error <= bound)),
            tensors=extent.tensors,
            before=extent.before,
            after=extent.after,
            constants_before=extent.constants_before,
            constants_after=extent.constants_after,
        )


def _per_channel(values: Array, finite: Array) -> Array:
    """Largest magnitude of each channel, then again without the channel's mean.

    The second half does not see the rounding of a bias, which can hide a wrong weight beside a large mean. Channels
    are on axis 1, and on the last one where that is another.
    """
    known = np.atleast_2d(np.where(finite, values, 0.0))
    parts = []
    for axis in {1, known.ndim - 1}:
        rows = np.moveaxis(known, axis, 0)
        rows = rows.reshape(len(rows), -1)
        centred = rows - rows.mean(axis=1, keepdims=True) if rows.size else rows
        parts += [np.abs(part).max(axis=1, initial=0.0) for part in (rows, centred)]
    return np.concatenate(parts)


def _force(folded: ModelProto, cuts: set[str]) -> ModelProto:
    """The graph with every cut made: computed under another name, and read from a new input by what follows.

    Constant nodes become initializers.
    """
    forced = ModelProto()
    forced.CopyFrom(folded)
    constants = [node for node in forced.graph.node if node.op_type == "Constant" and node.attribute[0].HasField("t")]
    for node in constants:
        tensor = forced.graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        forced.graph.node.remove(node)
    for node in forced.graph.node:
        for index, name in enumerate(node.output):
            if name in cuts:
                node.output[index] = name + _COMPUTED
    inputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in sorted(cuts)]
    forced.graph.input.extend(inputs)
    return forced


def _moved(tensors: Sequence[TensorProto], generator: np.random.Generator) -> dict[str, Array]:
    moved = {}
    for tensor in tensors:
        values = numpy_helper.to_array(tensor)
        half_ulp = np.spacing(np.abs(values)).astype(np.float64) / 2
        signs = generator.integers(0, 2, values.shape, dtype=np.int8) * 2 - 1
        moved[tensor.name] = values.astype(np.float64) + half_ulp * signs
    return moved


def _stored_weights(model: ModelProto) -> list[TensorProto]:
    """Floating-point constants that enter a linear operator, or as vectors an elementwise one."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers: dict[str, NodeProto] = {}
    for node in model.graph.node:
        producers.update(dict.fromkeys(node.output, node))
    found: dict[str, TensorProto] = {}
    for node in model.graph.node:
        if node.op_type not in _LINEAR | _ELEMENTWISE:
            continue
        for name in node.input:
            source = _source(name, producers)
            tensor = constants.get(source)
            if tensor is not None and _is_weight(tensor, is_scalar_allowed=node.op_type in _LINEAR):
                found[source] = tensor
    return list(found.values())


def _source(name: str, producers: dict[str, NodeProto]) -> str:
    while (node := producers.get(name)) is not None and node.op_type in _PASSING:
        name = node.input[0]
    return name


def _is_weight(tensor: TensorProto, *, is_scalar_allowed: bool) -> bool:
    is_float = tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    return is_float and (is_scalar_allowed or int(np.prod(tensor.dims)) > 1)


def _eps(tensor: TensorProto) -> float:
    return epsilon(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)))
