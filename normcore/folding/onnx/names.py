"""Names in a graph: what a node reads, and all that are taken."""

from collections.abc import Iterator

from onnx import GraphProto, NodeProto

from normcore.checkpoints.onnx_structure import bodies, walk_graphs


def used_names(node: NodeProto) -> list[str]:
    """Every name a node reads, once per input; whatever its subgraphs mention counts, as they see the names around."""
    names = [name for name in node.input if name]
    for body in bodies(node):
        for graph, _ in walk_graphs(body):
            names.extend(name for inner in graph.node for name in inner.input if name)
            names.extend(info.name for info in graph.output)
    return names


def all_names(top: GraphProto) -> Iterator[str]:
    """Every name of a tensor or node, subgraphs included."""
    for graph, _ in walk_graphs(top):
        for node in graph.node:
            yield node.name
            yield from node.input
            yield from node.output
        for group in (graph.input, graph.output, graph.initializer, graph.value_info):
            yield from (item.name for item in group)
        yield from (sparse.values.name for sparse in graph.sparse_initializer)


__all__ = ["all_names", "used_names"]
