"""An ONNX graph with every floating-point tensor in double precision; integers stay what they are."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
# Attributes that name the datatype of a node's output.
_TYPE_ATTRIBUTES = {"Cast": "to", "EyeLike": "dtype", "SequenceEmpty": "dtype"}


def to_double(model: ModelProto) -> ModelProto:
    """Copy of a model in which initializers, constants, casts, inputs and outputs of any float type are double.

    Attributes that are plain floats (an epsilon) keep their float32 value: it is what the network means.
    """
    double = ModelProto()
    double.CopyFrom(model)
    _convert_graph(double.graph)
    for function in double.functions:
        _convert_nodes(function.node)
    return double


def _convert_graph(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _convert_tensor(tensor)
    for sparse in graph.sparse_initializer:
        _convert_tensor(sparse.values)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in FLOATS:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    _convert_nodes(graph.node)


def _convert_nodes(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        if node.op_type == "Constant":
            _convert_constant(node)
        if node.op_type == "ConstantOfShape" and not node.attribute:
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))
        for attribute in node.attribute:
            _convert_attribute(node.op_type, attribute)


def _convert_constant(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "value_float":
            value = np.array(attribute.f, dtype=np.float64)
        elif attribute.name == "value_floats":
            value = np.array(attribute.floats, dtype=np.float64)
        else:
            continue
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))


def _convert_attribute(operator: str, attribute: AttributeProto) -> None:
    if attribute.name == _TYPE_ATTRIBUTES.get(operator) and attribute.i in FLOATS:
        attribute.i = TensorProto.DOUBLE
    elif attribute.type == AttributeProto.TENSOR:
        _convert_tensor(attribute.t)
    elif attribute.type == AttributeProto.SPARSE_TENSOR:
        _convert_tensor(attribute.sparse_tensor.values)
    elif attribute.type == AttributeProto.GRAPH:
        _convert_graph(attribute.g)
    for graph in attribute.graphs:
        _convert_graph(graph)


def _convert_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in FLOATS and tensor.data_type != TensorProto.DOUBLE:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
