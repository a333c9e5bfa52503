"""What is to be folded: batch norms, and rows of elementwise operators that scale each channel by its own constant."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS
from normcore.folding.affine import identity
from normcore.folding.onnx.batch_norm import CHANNEL_AXIS, read_affine
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.elementwise import OPERATORS, SCALING, Elementwise, read_elementwise
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.refusal import Refusal

BATCH_NORM = "BatchNormalization"


@dataclass(frozen=True, slots=True)
class Seed:
    """Nodes in a row that together are one map per channel, and the slot of each that the row goes through."""

    nodes: tuple[int, ...]
    slots: tuple[int, ...]

    def input(self, graph: Graph) -> str:
        return str(graph.node(self.nodes[0]).input[self.slots[0]])

    def output(self, graph: Graph) -> str:
        return str(graph.node(self.nodes[-1]).output[0])

    def pattern(self, graph: Graph) -> list[str]:
        return [graph.node(index).op_type for index in self.nodes]

    def demand(self, graph: Graph) -> Demand:
        """The map of the whole row. Raises Refusal."""
        head = graph.node(self.nodes[0])
        rank = graph.rank(self.input(graph))
        if head.op_type == BATCH_NORM:
            return Demand(read_affine(graph, head), CHANNEL_AXIS, rank)
        return _combine(graph, [read_elementwise(graph, index) for index in self.nodes], rank)

    def remove(self, graph: Graph) -> None:
        """Drop the row; who read its output reads its input."""
        for index, slot in zip(self.nodes, self.slots, strict=True):
            graph.bypass(index, slot)

    def replace(self, graph: Graph) -> None:
        """Drop the row; what makes its input takes the name of its output."""
        last = self._shorten(graph)
        graph.replace(last, by=graph.node(last).input[self.slots[-1]])

    def substitute(self, graph: Graph, chain: Sequence[tuple[str, str]]) -> list[int]:
        """Put other elementwise operators in the place of the row; its output keeps its name."""
        return graph.substitute(self._shorten(graph), self.slots[-1], chain)

    def _shorten(self, graph: Graph) -> int:
        for index, slot in zip(self.nodes[:-1], self.slots[:-1], strict=True):
            graph.bypass(index, slot)
        return self.nodes[-1]


def batch_norms(graph: Graph) -> Iterator[Seed]:
    """Every batch norm of the graph itself."""
    for index, node in graph.nodes():
        if node.domain in STANDARD_DOMAINS and node.op_type == BATCH_NORM:
            yield Seed((index,), (0,))


def scalings(graph: Graph) -> Iterator[Seed]:
    """Rows of Mul, Div, Add and Sub with constants, one of which scales the channels of an axis differently.

    A bias alone or one factor for everything is no normalization: such nodes belong to a row, and make none.
    """
    found = {index: each for index, node in graph.nodes() if (each := _read(graph, index)) is not None}
    for index in found:
        if _next(graph, index) in found:
            continue
        row = [index]
        while (before := graph.producer(graph.node(row[0]).input[found[row[0]].slot])) in found:
            if _next(graph, before) != row[0]:
                break
            row.insert(0, before)
        members = tuple(row)
        if any(_scales_channels(graph, found[member]) for member in members):
            yield Seed(members, tuple(found[member].slot for member in members))


def _read(graph: Graph, index: int) -> Elementwise | None:
    node = graph.node(index)
    if node.op_type not in OPERATORS or node.domain not in STANDARD_DOMAINS:
        return None
    try:
        found = read_elementwise(graph, index)
    except Refusal:
        return None
    rank = graph.rank(node.input[found.slot])
    if rank is None or len(found.shape) > rank:
        return None
    return found if found.axis(rank) is not None or found.scale.size == 1 else None


def _next(graph: Graph, index: int) -> int | None:
    """The one node that reads what a node makes."""
    output = graph.node(index).output[0]
    consumers = graph.consumers(output)
    return consumers[0][0] if len(consumers) == 1 and not graph.is_output(output) else None


def _scales_channels(graph: Graph, node: Elementwise) -> bool:
    """Whether it multiplies several channels, and the file says that there are as many of them."""
    operator, source = graph.node(node.index).op_type, graph.node(node.index).input[node.slot]
    shape = graph.shape(source)
    if operator not in SCALING or shape is None:
        return False
    axis = node.axis(len(shape))
    return axis is not None and shape[axis] == node.scale.size


def _combine(graph: Graph, row: list[Elementwise], rank: int | None) -> Demand:
    if rank is None:
        raise Refusal("the file leaves the rank of its input free")
    axes = {axis for each in row if (axis := each.axis(rank)) is not None}
    if len(axes) != 1:
        raise Refusal("its constants vary along several axes")
    axis = axes.pop()
    channels = max(each.scale.size for each in row)
    shape = graph.shape(graph.node(row[0].index).input[row[0].slot])
    if shape is None or shape[axis] != channels:
        raise Refusal(f"the file leaves free how many channels there are on axis {axis}")
    affine = identity(channels)
    for each in row:
        affine = each.on(graph, axis, rank, channels=channels).after(affine)
    return Demand(affine, axis, rank)


__all__ = ["BATCH_NORM", "Seed", "batch_norms", "scalings"]
