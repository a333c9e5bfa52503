"""Freezing: a network exported in training mode made to compute with its running statistics."""

import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper

from normcore.checkpoints.onnx import is_in_training_mode, opset_of
from normcore.checkpoints.onnx_structure import walk_graphs
from normcore.errors import CheckpointError

_RUNNING = {1: 3, 2: 4}  # output of a batch norm in training mode: the input that it updates


def freeze_training_mode(model: ModelProto) -> tuple[ModelProto, tuple[str, ...]]:
    """A copy of the model whose batch norms and dropouts compute as in inference, and the outputs of these nodes.

    A batch norm then normalizes by the running mean and variance that are its inputs, y = (x - mean) / sqrt(var +
    eps) * scale + bias; where the graph uses its updated statistics, these become the running ones unchanged. A
    dropout passes its input on.

    Args:
        model: from `load_onnx`; it is not changed.

    Returns:
        The frozen model (a plain copy where nothing is in training mode), and the first output of every node changed.

    Raises:
        CheckpointError: the graph uses something that exists in training only: the statistics of the batch, or the
            mask of a dropout.
    """
    frozen = ModelProto()
    frozen.CopyFrom(model)
    opset, read = opset_of(model), _names_read(model)
    changed: list[str] = []
    for graph, _ in walk_graphs(frozen.graph):
        nodes = []
        for node in graph.node:
            if is_in_training_mode(node, graph, opset):
                changed.append(node.output[0])
                used = {index for index, name in enumerate(node.output) if index and name in read}
                nodes += (
                    _freeze_norm(node, used) if node.op_type == "BatchNormalization" else _freeze_dropout(node, used)
                )
            else:
                nodes.append(node)
        _replace_nodes(graph, nodes)
    if changed:
        onnx.checker.check_model(frozen)
    return frozen, tuple(changed)


def _names_read(model: ModelProto) -> frozenset[str]:
    graphs = [graph for graph, _ in walk_graphs(model.graph)]
    outputs = {output.name for graph in graphs for output in graph.output}
    return frozenset(outputs.union(name for graph in graphs for node in graph.node for name in node.input))


def _freeze_norm(node: NodeProto, used: set[int]) -> list[NodeProto]:
    lost = sorted(used - set(_RUNNING))
    if lost:
        names = ", ".join(node.output[index] for index in lost)
        raise CheckpointError(
            f"batch norm {node.name or node.output[0]}: the graph uses {names}, statistics of the batch"
        )
    kept = [helper.make_node("Identity", [node.input[_RUNNING[index]]], [node.output[index]]) for index in sorted(used)]
    frozen = NodeProto()
    frozen.CopyFrom(node)
    del frozen.output[1:]
    attributes = [attribute for attribute in node.attribute if attribute.name != "training_mode"]
    del frozen.attribute[:]
    frozen.attribute.extend(attributes)
    return [frozen, *kept]


def _freeze_dropout(node: NodeProto, used: set[int]) -> list[NodeProto]:
    if used:
        raise CheckpointError(f"dropout {node.name or node.output[0]}: the graph uses its mask {node.output[1]}")
    return [helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name)]


def _replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


__all__ = ["freeze_training_mode"]
