"""Small ONNX networks, and the one judgement about them: onnxruntime without optimizations."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from normcore.checkpoints.onnx_shapes import infer_types
from normcore.execution import open_session, run
from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.options import FoldOptions
from normcore.folding.reference import Reference
from normcore.folding.report import PlanEntry

Array = NDArray[Any]


class Net:
    """A network under construction; every method returns the name of the tensor it makes."""

    def __init__(self, *, opset: int = 17, seed: int = 0, dtype: Any = np.float32) -> None:
        self.generator = np.random.default_rng(seed)
        self.opset = opset
        self.dtype = dtype
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._count = 0

    def constant(self, array: Any, name: str = "") -> str:
        name = name or self._fresh("w")
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((self.generator.standard_normal(shape) * scale).astype(self.dtype))

    def op(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or self._fresh("t")
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name, **attributes))
        return output

    def norm_parameters(self, channels: int) -> tuple[str, str, str, str]:
        """Scales of both signs, variances over three decades."""
        draw = self.generator
        scale = draw.uniform(0.5, 2.0, channels) * draw.choice([-1.0, 1.0], channels)
        vectors = (
            scale,
            draw.standard_normal(channels),
            draw.standard_normal(channels),
            10 ** draw.uniform(-2, 1, channels),
        )
        first, second, third, fourth = (self.constant(vector.astype(self.dtype)) for vector in vectors)
        return first, second, third, fourth

    def norm(self, name: str, channels: int, *, output: str = "", **attributes: Any) -> str:
        return self.op("BatchNormalization", name, *self.norm_parameters(channels), output=output, **attributes)

    def model(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        *outputs: str,
        overridable: Sequence[str] = (),
        ir_version: int = 8,
    ) -> ModelProto:
        data_type = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        declared = [helper.make_tensor_value_info(name, data_type, shape) for name, shape in inputs.items()]
        for name in overridable:
            tensor = self.initializers[name]
            declared.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        results = [helper.make_tensor_value_info(name, data_type, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", declared, results, list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version)
        types = infer_types(model).top
        for result in model.graph.output:
            found = types.get(result.name)
            shape = found.shape if found and found.shape else ("rows", "columns")
            sizes = [result.name + str(axis) if size is None else size for axis, size in enumerate(shape)]
            result.CopyFrom(helper.make_tensor_value_info(result.name, data_type, sizes))
        onnx.checker.check_model(model)
        return model

    def _fresh(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"


def evaluate(model: ModelProto, **feeds: Array) -> list[Array]:
    return run(open_session(model.SerializeToString(), threads=1, optimization="none"), feeds, deadline_s=30)


def difference(left: Array, right: Array) -> float:
    """max|left - right| / max|right|; without the division where right is zero everywhere."""
    assert left.shape == right.shape
    exact = right.astype(np.float64)
    return float(np.abs(left.astype(np.float64) - exact).max() / (np.abs(exact).max() or 1.0))


def fold_and_compare(
    model: ModelProto, *, tolerance: float = 3e-6, options: FoldOptions | None = None, **feeds: Array
) -> tuple[ModelProto, tuple[PlanEntry, ...]]:
    """Fold; assert that the original is untouched, the interface stays, and both compute the same.

    The same is what onnxruntime computes without optimizations, and what float64 does: the second sees a mistake of
    the size of float32's rounding.
    """
    before = model.SerializeToString()
    folded, entries = fold_onnx(model, **(options or {}))
    assert model.SerializeToString() == before
    assert folded.graph.input == model.graph.input
    assert folded.graph.output == model.graph.output
    assert folded.opset_import == model.opset_import
    assert options or len(folded.graph.node) <= len(model.graph.node)
    onnx.checker.check_model(folded, full_check=True)
    exact, expected_exact = (Reference(each).run(feeds) for each in (folded, model))
    for name, values in expected_exact.items():
        assert difference(exact[name], values) <= tolerance
    for result, expected in zip(evaluate(folded, **feeds), evaluate(model, **feeds), strict=True):
        assert difference(result, expected) <= tolerance
    return folded, entries


def refusal(model: ModelProto, **options: Unpack[FoldOptions]) -> str:
    """Why the only normalization of a model does not fold backward; nothing at all may have changed."""
    return reasons(model, **options)[0]


def forward_refusal(model: ModelProto, **options: Unpack[FoldOptions]) -> str:
    """Why the only normalization of a model does not fold forward; nothing at all may have changed."""
    return reasons(model, **options)[1]


def reasons(model: ModelProto, **options: Unpack[FoldOptions]) -> list[str]:
    """Both reasons, or the one that holds for both directions."""
    folded, entries = fold_onnx(model, **options)
    assert folded == model
    (entry,) = entries
    assert entry.status == "kept"
    assert entry.reason
    return entry.reason.split("; forward: ")


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def noise(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
