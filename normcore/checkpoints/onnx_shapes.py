"""Types of every tensor of a graph, as far as the file alone determines them.

onnx's shape inference does the work, in rounds: whatever small integer vectors become computable between two rounds
(Shape, Gather, Concat, ... of constants) enter the next one as constants. Its own data propagation would do this in
one call, but allocates one message per element: an Add of two vectors of 3e8 elements takes gigabytes. Shapes that
the file claims (value_info) are dropped first, as nothing holds a runtime to them.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from normcore.checkpoints.onnx_constants import Shape, Value, evaluate, tensor_value
from normcore.checkpoints.onnx_structure import bodies, count_elements, walk_graphs
from normcore.errors import CheckpointError

_SMALL = 1024
_MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type (a TensorProto.DataType) and shape; None for a rank or size that the file leaves free."""

    data_type: int
    shape: Shape | None


@dataclass(frozen=True, slots=True)
class Types:
    """Types by tensor name: of the graph itself, and of everything in it, subgraphs included."""

    top: Mapping[str, TensorType]
    everywhere: tuple[tuple[str, TensorType], ...]


def infer_types(model: ModelProto, *, overridable: Collection[str] = ()) -> Types:
    """Types of all tensors that the inputs and constants determine.

    Args:
        model: any model.
        overridable: initializers that a caller may replace: nothing but their declared types is known.

    Raises:
        CheckpointError: the operators contradict one another.
    """
    skeleton = _skeleton(model, overridable)
    inferred = skeleton
    for _ in range(_MAX_ROUNDS):
        try:
            inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=False)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the shapes of the graph cannot be inferred: {_first_line(error)}") from error
        if not _propagate(skeleton.graph, _types_of(inferred.graph), {}):
            break
    return Types(
        top=_types_of(inferred.graph),
        everywhere=tuple(pair for graph, _ in walk_graphs(inferred.graph) for pair in _types_of(graph).items()),
    )


def tensor_type(info: ValueInfoProto) -> TensorType | None:
    """The type of a dense tensor; None for sequences, maps and optionals."""
    if not info.type.HasField("tensor_type"):
        return None
    declared = info.type.tensor_type
    if not declared.HasField("shape"):
        return TensorType(declared.elem_type, None)
    sizes = tuple(
        size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else None for size in declared.shape.dim
    )
    return TensorType(declared.elem_type, sizes)


def _skeleton(model: ModelProto, overridable: Collection[str]) -> ModelProto:
    """The model without claimed shapes and without the data of large initializers, which become inputs."""
    skeleton = ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    skeleton.graph.name = "skeleton"
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in overridable]
    named = {tensor.name for tensor in constants}
    skeleton.graph.input.extend(info for info in model.graph.input if info.name not in named)
    for tensor in constants:
        if _elements(tensor) <= _SMALL:
            skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(_declared(tensor.name, tensor))
    for node in model.graph.node:
        tensor = _large_constant(node)
        if tensor is None:
            skeleton.graph.node.append(node)
        else:
            skeleton.graph.input.append(_declared(node.output[0], tensor))
    skeleton.graph.output.extend(ValueInfoProto(name=info.name) for info in model.graph.output)
    for graph, _ in walk_graphs(skeleton.graph):
        del graph.value_info[:]
    return skeleton


def _propagate(graph: GraphProto, types: Mapping[str, TensorType], outer: Mapping[str, Value]) -> bool:
    """Put small computed constants into the graph as Constant nodes, subgraphs included; whether there were any."""
    known = dict(outer)
    for tensor in graph.initializer:
        value = tensor_value(tensor, max_elements=_SMALL)
        if value is not None:
            known[tensor.name] = value
    nodes: list[NodeProto] = []
    has_changed = False
    for node in graph.node:
        value = _value_of(node, known, types)
        if value is not None:
            known[node.output[0]] = value
            if node.op_type != "Constant":
                has_changed = True
                node = _constant_node(node.output[0], value)
        for body in bodies(node):
            has_changed |= _enter(body, known)
        nodes.append(node)
    if has_changed:
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    return has_changed


def _value_of(node: NodeProto, known: Mapping[str, Value], types: Mapping[str, TensorType]) -> Value | None:
    if len(node.output) != 1:
        return None
    first = types.get(node.input[0]) if node.input else None
    operands = [known.get(name) for name in node.input]
    value = evaluate(node, operands, first.shape if first else None, max_elements=_SMALL)
    return value if value is None or value.dtype.kind in "iufb" else None


def _enter(body: GraphProto, known: Mapping[str, Value]) -> bool:
    """A body sees the constants around it only as constants of its own."""
    types = _types_of(body)
    defined = {name for node in body.node for name in node.output}
    wanted = {name for node in body.node for name in node.input} & set(known) - defined
    for name in sorted(wanted):
        body.node.insert(0, _constant_node(name, known[name]))
    return _propagate(body, types, {}) or bool(wanted)


def _types_of(graph: GraphProto) -> dict[str, TensorType]:
    types = {tensor.name: TensorType(tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for info in _infos(graph):
        found = tensor_type(info)
        if found is not None:
            types.setdefault(info.name, found)
    return types


def _infos(graph: GraphProto) -> Iterator[ValueInfoProto]:
    yield from graph.input
    yield from graph.value_info
    yield from graph.output


def _constant_node(name: str, value: Value) -> NodeProto:
    return onnx.helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, order="C")))


def _large_constant(node: NodeProto) -> TensorProto | None:
    if node.op_type == "Constant":
        tensors: list[TensorProto] = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        return next((tensor for tensor in tensors if _elements(tensor) > _SMALL), None)
    return None


def _declared(name: str, tensor: TensorProto) -> ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


def _elements(tensor: TensorProto) -> int:
    return count_elements(tuple(tensor.dims))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


__all__ = ["TensorType", "Types", "infer_types", "tensor_type"]
