"""onnx's own checker, without the copies of every weight that it makes on its way into C++."""

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS, count_elements

_SMALL = 1024


def check_model(model: ModelProto) -> None:
    """Names defined once and before use, known operators, attributes of the right type.

    Large constants are checked as inputs of the same name: their contents are `check_structure`'s to judge.

    Raises:
        ValueError: the model is not valid. The checker's own errors are RuntimeErrors too.
    """
    onnx.checker.check_model(_without_weights(model), full_check=False)


def _without_weights(model: ModelProto) -> ModelProto:
    light = ModelProto()
    for descriptor, value in model.ListFields():
        if descriptor.name == "graph":
            continue
        if descriptor.type == descriptor.TYPE_MESSAGE:
            getattr(light, descriptor.name).extend(value)
        else:
            setattr(light, descriptor.name, value)
    graph, source = light.graph, model.graph
    graph.name, graph.doc_string = source.name, source.doc_string
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    graph.sparse_initializer.extend(source.sparse_initializer)
    declared = {info.name for info in source.input}
    for tensor in source.initializer:
        if count_elements(tuple(tensor.dims)) <= _SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            _declare(light, tensor.name, tensor)
    for node in source.node:
        value = _large_value(node)
        if value is None:
            graph.node.append(node)
        else:
            _declare(light, node.output[0], value)
    return light


def _declare(light: ModelProto, name: str, tensor: TensorProto) -> None:
    light.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def _large_value(node: NodeProto) -> TensorProto | None:
    """The tensor of a well-formed Constant; anything else is the checker's to judge."""
    is_constant = node.op_type == "Constant" and node.domain in STANDARD_DOMAINS
    if not is_constant or node.input or len(node.output) != 1 or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    is_value = attribute.name == "value" and attribute.type == attribute.TENSOR and attribute.HasField("t")
    return attribute.t if is_value and count_elements(tuple(attribute.t.dims)) > _SMALL else None


__all__ = ["check_model"]
