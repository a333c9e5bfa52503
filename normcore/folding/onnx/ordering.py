"""Nodes back into a graph, each behind what it reads, and constants."""

from collections.abc import Mapping
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from normcore.folding.onnx.names import used_names


def write_nodes(graph: GraphProto, nodes: Mapping[int, NodeProto]) -> None:
    """Leave these nodes in the graph: the old ones in their order, new ones before the first that reads them."""
    ordered = _sort(nodes)
    if ordered == sorted(nodes) and max(nodes, default=-1) < len(graph.node):
        for index in reversed(range(len(graph.node))):
            if index not in nodes:
                del graph.node[index]
        return
    copies = [NodeProto.FromString(nodes[index].SerializeToString()) for index in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def drop(items: Any, names: set[str]) -> None:
    """Delete the entries of a repeated field that have one of these names."""
    for index in reversed(range(len(items))):
        if items[index].name in names:
            del items[index]


def fill(tensor: TensorProto, name: str, array: NDArray[Any]) -> None:
    """Make a constant of a graph another one."""
    tensor.Clear()
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.raw_data = numpy_helper.tobytes_little_endian(array)


def _sort(nodes: Mapping[int, NodeProto]) -> list[int]:
    """Positions, stably: each node where it was, unless it has to wait for one behind it."""
    producers = {name: index for index, node in nodes.items() for name in node.output if name}
    ordered: list[int] = []
    done: set[int] = set()
    for first in sorted(nodes):
        pending = [first]
        while pending:
            index = pending[-1]
            needed = {producers[name] for name in used_names(nodes[index]) if name in producers} - done - {index}
            if index in done or not needed:
                pending.pop()
                ordered += [] if index in done else [index]
                done.add(index)
            else:
                pending.extend(sorted(needed))
    return ordered


__all__ = ["drop", "fill", "write_nodes"]
