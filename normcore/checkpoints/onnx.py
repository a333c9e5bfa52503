"""ONNX files: read with suspicion, and described without running anything."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from normcore.checkpoints.formats import ADVICE, HEAD_BYTES, sniff
from normcore.checkpoints.onnx_checker import check_model
from normcore.checkpoints.onnx_shapes import infer_types, tensor_type
from normcore.checkpoints.onnx_structure import (
    STANDARD_DOMAINS,
    GraphLimits,
    check_size,
    check_structure,
    count_elements,
    element_bits,
    walk_graphs,
)
from normcore.errors import CheckpointError

_DATATYPES: dict[int, str] = {
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.UINT16: "UINT16",
    TensorProto.UINT32: "UINT32",
    TensorProto.UINT64: "UINT64",
    TensorProto.INT8: "INT8",
    TensorProto.INT16: "INT16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64",
    TensorProto.STRING: "BYTES",
}
_DEFAULT_LIMITS = GraphLimits()
_TRAINING_MODE_OPSET = 14


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One input or output: protocol datatype, or ONNX's own word where the protocol has none; -1 for a free axis.

    The shape is None where the file leaves the rank free.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What a checkpoint is, without running it.

    Attributes:
        inputs: what a caller has to give: graph inputs without those that have a default.
        nodes: nodes of the graph and its subgraphs.
        tensors: weights: initializers and Constant tensors.
        parameters: elements of those together.
        bytes: their size.
        operators: how often each operator occurs, subgraphs included.
        has_training_mode: some batch norm or dropout computes as it does in training.
    """

    format: str
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[TensorSummary, ...]
    outputs: tuple[TensorSummary, ...]
    nodes: int
    tensors: int
    parameters: int
    bytes: int
    operators: dict[str, int]
    has_training_mode: bool


def load_onnx(path: Path, *, limits: GraphLimits = _DEFAULT_LIMITS) -> ModelProto:
    """The model in a file, once it is known to be one file of plain ONNX of bounded size.

    Args:
        path: file of any name; its content decides.
        limits: how large the graph and the tensors that the file determines may be.

    Raises:
        CheckpointError: the file is something else, damaged, not self-contained, invalid or too large.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    found = sniff(head)
    if found != "onnx":
        raise CheckpointError(ADVICE[found])
    try:
        model: ModelProto = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise CheckpointError("the file is not a complete ONNX model: it is damaged, cut short or not ONNX") from None
    check_structure(model, limits)
    _check_validity(model)
    for name, found_type in infer_types(model).everywhere:
        if found_type.shape is not None and found_type.data_type in TensorProto.DataType.values():
            sizes = tuple(1 if size is None else size for size in found_type.shape)
            check_size(name, found_type.data_type or TensorProto.UINT8, sizes, limits)
    return model


def inspect_onnx(model: ModelProto) -> CheckpointSummary:
    """Describe a model from `load_onnx`."""
    opset = opset_of(model)
    graphs = [graph for graph, _ in walk_graphs(model.graph)]
    nodes = [node for graph in graphs for node in graph.node]
    weights = [tensor for graph in graphs for tensor in _weights(graph)]
    defaults = {tensor.name for tensor in model.graph.initializer}
    return CheckpointSummary(
        format="onnx",
        opset=opset,
        ir_version=model.ir_version,
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        inputs=tuple(_summarize(info) for info in model.graph.input if info.name not in defaults),
        outputs=tuple(_summarize(info) for info in model.graph.output),
        nodes=len(nodes),
        tensors=len(weights),
        parameters=sum(count_elements(tuple(tensor.dims)) for tensor in weights),
        bytes=sum(_size_bytes(tensor) for tensor in weights),
        operators=dict(sorted(Counter(node.op_type for node in nodes).items())),
        has_training_mode=any(is_in_training_mode(node, graph, opset) for graph in graphs for node in graph.node),
    )


def opset_of(model: ModelProto) -> int:
    """Version of the standard operators."""
    versions = [int(entry.version) for entry in model.opset_import if entry.domain in STANDARD_DOMAINS]
    return max(versions)


def is_in_training_mode(node: NodeProto, graph: GraphProto, opset: int) -> bool:
    """Whether a batch norm or dropout of this graph computes as it does in training."""
    if node.op_type == "BatchNormalization":
        if opset < _TRAINING_MODE_OPSET and len(node.output) > 1:
            return True  # before the attribute existed, listing the statistics as outputs meant training
        return any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
    if node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]:
        return False
    modes = {tensor.name: tensor for tensor in graph.initializer}
    for producer in graph.node:
        if producer.op_type == "Constant" and producer.attribute and producer.attribute[0].HasField("t"):
            modes[producer.output[0]] = producer.attribute[0].t
    mode = modes.get(node.input[2])
    return mode is None or bool(numpy_helper.to_array(mode).any())


def _check_validity(model: ModelProto) -> None:
    """Run onnx's own checker: names defined once and before use, known operators, attributes of the right type."""
    try:
        check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), "no reason given")
        raise CheckpointError(f"the ONNX model is not valid: {first[:300]}") from error


def _summarize(info: ValueInfoProto) -> TensorSummary:
    found = tensor_type(info)
    if found is None:
        return TensorSummary(info.name, (info.type.WhichOneof("value") or "unknown").removesuffix("_type"), None)
    shape = None if found.shape is None else tuple(-1 if size is None else size for size in found.shape)
    datatype = _DATATYPES.get(found.data_type) or TensorProto.DataType.Name(found.data_type)
    return TensorSummary(info.name, datatype, shape)


def _weights(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _size_bytes(tensor: TensorProto) -> int:
    if tensor.data_type == TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    return (count_elements(tuple(tensor.dims)) * element_bits(tensor.data_type) + 7) // 8


__all__ = [
    "CheckpointSummary",
    "GraphLimits",
    "TensorSummary",
    "inspect_onnx",
    "is_in_training_mode",
    "load_onnx",
    "opset_of",
]
