"""The proof of each fold by itself: the output of every normalization that went into another operator.

The folded graph is evaluated in float64 with each such output replaced, for what follows, by the original's. So every
difference is the work of one fold. It may be what rounding the stored weights does, and that is measured: the same
evaluation with every stored weight moved by half a unit in its last place, a few times, channel by channel,
with each channel's mean and without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from normcore.folding.comparison import epsilon, largest, same_infinities
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
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "BatchNormalization"})
_PASSING = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"})
_COMPUTED = "//computed"


def find_regions(original: ModelProto, folded: ModelProto) -> list[str]:
    """Outputs of the original's batch normalizations that another operator produces in the folded graph."""
    producers = {name: node.op_type for node in folded.graph.node for name in node.output}
    outputs = [node.output[0] for node in original.graph.node if node.op_type == "BatchNormalization"]
    return [name for name in outputs if producers.get(name, "BatchNormalization") != "BatchNormalization"]


class RegionProof:
    """Compares the regions of two graphs, probe by probe."""

    def __init__(self, original: Reference, folded: ModelProto, regions: Sequence[str], *, seed: int) -> None:
        self._original = original
        self._regions = list(regions)
        self._errors = {name: _Pool() for name in regions}
        forced = _force(folded, set(regions))
        self._folded = Reference(forced)
        generator = np.random.default_rng(seed)
        stored = _stored_weights(forced)
        self._eps = max((_eps(tensor) for tensor in stored), default=float(np.finfo(np.float32).eps))
        self._moved = [Reference(_move_weights(forced, generator)) for _ in range(_DRAWS)]

    def add(self, feeds: Feeds, *, deadline: float) -> None:
        """Evaluate one more probe."""
        expected = self._original.run(feeds, self._regions, deadline=deadline)
        names = [name + _COMPUTED for name in self._regions]
        computed = self._folded.run({**feeds, **expected}, names, deadline=deadline)
        moved = [reference.run({**feeds, **expected}, names, deadline=deadline) for reference in self._moved]
        for name in self._regions:
            key = name + _COMPUTED
            self._errors[name].add(expected[name], computed[key], [values[key] for values in moved])

    def regions(self) -> tuple[Region, ...]:
        return tuple(pool.region(name, self._eps) for name, pool in self._errors.items())


@dataclass(slots=True)
class _Pool:
    """Per channel, with its mean and without, the largest error, noise and element over all probes."""

    error: Array | float = 0.0
    noise: Array | float = 0.0
    scale: Array | float = 0.0
    comparable: bool = True

    def add(self, expected: Array, computed: Array, moved: list[Array]) -> None:
        if expected.shape != computed.shape or not same_infinities(expected, computed):
            self.comparable = False
            return
        finite = np.isfinite(expected)
        self.error = np.maximum(self.error, _per_channel(computed - expected, finite))
        self.scale = np.maximum(self.scale, _per_channel(expected, finite))
        for values in moved:
            self.noise = np.maximum(self.noise, _per_channel(values - computed, finite))

    def region(self, name: str, eps: float) -> Region:
        scale = largest(np.asarray(self.scale))
        if not self.comparable:
            return Region(name, error=float("inf"), scale=scale, equivalent=False)
        relative = max(_ULPS * eps, _FOLDED_IN_FLOAT32)
        bound = _FACTOR * self.noise + relative * self.scale + _FLOOR * scale
        return Region(name, largest(np.asarray(self.error)), scale, bool(np.all(self.error <= bound)))


def _per_channel(values: Array, finite: Array) -> Array:
    """Largest magnitude of each channel, then again without the channel's mean.

    The second half does not see the rounding of a bias, which can hide a wrong weight beside a large mean.
    """
    rows = np.moveaxis(np.atleast_2d(np.where(finite, values, 0.0)), 1, 0)
    rows = rows.reshape(len(rows), -1)
    centred = rows - rows.mean(axis=1, keepdims=True) if rows.size else rows
    return np.concatenate([np.abs(part).max(axis=1, initial=0.0) for part in (rows, centred)])


def _force(folded: ModelProto, regions: set[str]) -> ModelProto:
    """The graph with every region cut: computed under another name, and read from a new input by what follows."""
    forced = ModelProto()
    forced.CopyFrom(folded)
    for node in forced.graph.node:
        for index, name in enumerate(node.output):
            if name in regions:
                node.output[index] = name + _COMPUTED
    inputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in sorted(regions)]
    forced.graph.input.extend(inputs)
    return forced


def _move_weights(model: ModelProto, generator: np.random.Generator) -> ModelProto:
    moved = ModelProto()
    moved.CopyFrom(model)
    for tensor in _stored_weights(moved):
        values = numpy_helper.to_array(tensor)
        half_ulp = np.spacing(np.abs(values)).astype(np.float64) / 2
        shifted = values.astype(np.float64) + half_ulp * generator.choice([-1.0, 1.0], values.shape)
        tensor.CopyFrom(numpy_helper.from_array(shifted, tensor.name))
    return moved


def _stored_weights(model: ModelProto) -> list[TensorProto]:
    """Floating-point constants that enter a linear operator, or as vectors an elementwise one."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers: dict[str, NodeProto] = {}
    for node in model.graph.node:
        producers.update(dict.fromkeys(node.output, node))
        if node.op_type == "Constant":
            values = [entry.t for entry in node.attribute if entry.name == "value"]
            constants.update(zip(node.output, values, strict=False))
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
