"""What an ONNX file may contain at all: checks that read the message and run nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from normcore.errors import CheckpointError

STANDARD_DOMAINS = ("", "ai.onnx")
NEWEST_OPSET = onnx.defs.onnx_opset_version()

_BITS: dict[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
    TensorProto.FLOAT6E2M3: 6,
    TensorProto.FLOAT6E3M2: 6,
}
_VALUE_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """How large an uploaded graph may be.

    Attributes:
        max_nodes: nodes of the graph and all its subgraphs together.
        max_tensor_bytes: the largest tensor whose size the file itself determines.
        max_subgraph_depth: levels of If, Loop and Scan bodies inside one another.
    """

    max_nodes: int = 100_000
    max_tensor_bytes: int = 1 << 30
    max_subgraph_depth: int = 4


def check_structure(model: ModelProto, limits: GraphLimits) -> None:
    """Refuse what is not plain ONNX in one file. Raises CheckpointError."""
    _check_header(model)
    nodes = 0
    for graph, depth in walk_graphs(model.graph):
        if depth > limits.max_subgraph_depth:
            raise CheckpointError(
                f"subgraphs are nested more than {limits.max_subgraph_depth} deep; simplify the model's control flow"
            )
        nodes += len(graph.node)
        if nodes > limits.max_nodes:
            raise CheckpointError(f"the graph has more than {limits.max_nodes} nodes")
        for node in graph.node:
            _check_domain(node)
        for tensor in graph_tensors(graph):
            _check_tensor(tensor, limits)
        for sparse in _sparse_tensors(graph):
            check_size(sparse.values.name, sparse.values.data_type, tuple(sparse.dims), limits)


def walk_graphs(graph: GraphProto) -> Iterator[tuple[GraphProto, int]]:
    """The graph and every subgraph, each with its depth; the graph itself has depth 0."""
    pending = [(graph, 0)]
    while pending:
        current, depth = pending.pop()
        yield current, depth
        pending.extend((body, depth + 1) for node in current.node for body in bodies(node))


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs of one node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor of one graph: initializers and attributes, the parts of sparse ones included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
    for sparse in _sparse_tensors(graph):
        yield sparse.values
        yield sparse.indices


def element_bits(data_type: int) -> int:
    """Bits of one element in memory; 0 for strings."""
    if data_type == TensorProto.STRING:
        return 0
    if data_type in _BITS:
        return _BITS[data_type]
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize) * 8


def check_size(name: str, data_type: int, dims: tuple[int, ...], limits: GraphLimits) -> None:
    """Refuse a tensor that would take too much memory. Raises CheckpointError."""
    if any(size < 0 for size in dims):
        raise CheckpointError(f"tensor {name!r} has a negative size in its shape {list(dims)}")
    total_bytes = (count_elements(dims) * max(element_bits(data_type), 1) + 7) // 8
    if total_bytes > limits.max_tensor_bytes:
        raise CheckpointError(
            f"tensor {name!r} of shape {list(dims)} takes {total_bytes} bytes; at most {limits.max_tensor_bytes} "
            "are accepted"
        )


def count_elements(dims: tuple[int, ...]) -> int:
    """Product of the sizes, without overflow."""
    total = 1
    for size in dims:
        total *= size
    return total


def _check_header(model: ModelProto) -> None:
    if not model.HasField("graph"):
        raise CheckpointError("the file holds no graph; export the model to ONNX again")
    if model.functions:
        raise CheckpointError(
            f"the model defines its own function {model.functions[0].name!r}; "
            "inline its functions before uploading (onnx.inliner.inline_local_functions)"
        )
    if model.training_info:
        raise CheckpointError("the model carries training graphs; upload the inference model alone")
    versions = [entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS]
    if not versions:
        raise CheckpointError("the model names no version of the standard operators (opset_import)")
    if len(set(versions)) > 1:
        raise CheckpointError(f"the model names several versions of the standard operators: {sorted(set(versions))}")
    if not 1 <= max(versions) <= NEWEST_OPSET:
        raise CheckpointError(f"opset {max(versions)} is not known; export with an opset up to {NEWEST_OPSET}")


def _check_domain(node: NodeProto) -> None:
    if node.domain not in STANDARD_DOMAINS:
        raise CheckpointError(
            f"node {node.name or node.op_type!r} uses operator {node.op_type} of domain {node.domain!r}; "
            "only the standard operators of ONNX are accepted, as no others can be proven and run safely"
        )


def _sparse_tensors(graph: GraphProto) -> Iterator[SparseTensorProto]:
    yield from graph.sparse_initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor
            yield from attribute.sparse_tensors


def _check_tensor(tensor: TensorProto, limits: GraphLimits) -> None:
    name = tensor.name
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise CheckpointError(
            f"tensor {name!r} keeps its data in another file; save the model as one file "
            "(onnx.save with save_as_external_data=False)"
        )
    if tensor.HasField("segment"):
        raise CheckpointError(f"tensor {name!r} is stored in segments, which are not supported")
    if tensor.data_type == TensorProto.UNDEFINED or tensor.data_type not in TensorProto.DataType.values():
        raise CheckpointError(f"tensor {name!r} has the unknown data type {tensor.data_type}")
    dims = tuple(tensor.dims)
    check_size(name, tensor.data_type, dims, limits)
    _check_length(tensor, count_elements(dims), element_bits(tensor.data_type))


def _check_length(tensor: TensorProto, elements: int, bits: int) -> None:
    lengths = {field: len(getattr(tensor, field)) for field in _VALUE_FIELDS}
    typed = {field: length for field, length in lengths.items() if length}
    if tensor.HasField("raw_data"):
        expected = (elements * bits + 7) // 8
        received = len(tensor.raw_data)
        if typed or received != expected or tensor.data_type == TensorProto.STRING:
            raise CheckpointError(
                f"tensor {tensor.name!r} of shape {list(tensor.dims)} needs {expected} bytes, received {received}"
            )
        return
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    per_element = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    packed = bits if bits in (2, 4, 6) and field == "int32_data" else 0
    expected = (elements * packed + 7) // 8 if packed else elements * per_element
    if set(typed) - {field} or lengths[field] not in (expected, elements * per_element):
        raise CheckpointError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} needs {expected} values in {field}, "
            f"received {typed or 'none'}"
        )


__all__ = [
    "NEWEST_OPSET",
    "STANDARD_DOMAINS",
    "GraphLimits",
    "bodies",
    "check_size",
    "check_structure",
    "count_elements",
    "element_bits",
    "graph_tensors",
    "walk_graphs",
]
