"""Where two graphs differ: the parts between tensors that both have, found from the graphs alone.

A name that nodes of both graphs produce is a cut. What lies between cuts is compared as an expression: operators,
attributes, the contents of constants and the names of the cuts it begins at. Where the two expressions differ, that
part was rewritten and has to be proven; where they are the same, the two graphs compute the same by construction.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property

from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from normcore.folding.report import TensorHash


@dataclass(frozen=True, slots=True)
class Extent:
    """A part that was rewritten, from cuts and graph inputs to the cut `output`.

    Attributes:
        output: the cut at its end.
        inputs: where it begins, in either graph.
        tensors: what only the original computes in it, and `output`.
        before: operators of the original, in its order.
        after: operators of the folded graph.
        constants_before: what only the original reads in it.
        constants_after: what only the folded graph reads in it.
    """

    output: str
    inputs: frozenset[str]
    tensors: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    constants_before: tuple[TensorHash, ...]
    constants_after: tuple[TensorHash, ...]


def find_extents(
    original: ModelProto, folded: ModelProto, *, is_cut: Callable[[str], bool] | None = None
) -> list[Extent]:
    """Every part that was rewritten, in the order of the original.

    Args:
        original: the graph before.
        folded: the graph after.
        is_cut: which of the common names are the same tensor in both; all of them by default.
    """
    sides = (_Side(original), _Side(folded))
    cuts = common_tensors(original, folded)
    cuts = [name for name in cuts if is_cut is None or is_cut(name)]
    known = frozenset(cuts)
    expressions = [side.expressions(known) for side in sides]
    changed = [name for name in cuts if expressions[0][name] != expressions[1][name]]
    return [_extent(sides[0], sides[1], name, known) for name in changed]


def common_tensors(original: ModelProto, folded: ModelProto) -> list[str]:
    """Names of tensors that nodes of both graphs compute from their inputs, in the order of the original."""
    others = _Side(folded).computed
    mine = _Side(original)
    return [name for node in original.graph.node for name in node.output if name in mine.computed and name in others]


class _Side:
    """One graph, read."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self._reads = {id(node): _reads(node) for node in self.nodes}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                values = [entry.t for entry in node.attribute if entry.HasField("t")]
                self._tensors.update(zip(node.output, values, strict=False))
        self._inputs = {info.name for info in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
        self._hashes: dict[str, TensorHash] = {}
        self._meaning = _meaning(model)

    def reads(self, node: NodeProto) -> list[str]:
        return self._reads[id(node)]

    @cached_property
    def computed(self) -> Set[str]:
        """Outputs of nodes that depend on an input of the graph."""
        found = set(self._inputs)
        for node in self.nodes:
            if not found.isdisjoint(self.reads(node)):
                found.update(name for name in node.output if name)
        return found - self._inputs

    def expressions(self, cuts: Set[str]) -> dict[str, bytes]:
        """By tensor, a digest of how it is computed from cuts, inputs and constants."""
        found: dict[str, bytes] = {}

        def reference(name: str) -> bytes:
            if name in cuts:
                return b"cut " + name.encode()
            return found.get(name) or self._leaf(name)

        for node in self.nodes:
            digest = hashlib.sha256(self._meaning + f"{node.domain}\0{node.op_type}\0".encode())
            for attribute in sorted(node.attribute, key=lambda entry: entry.name):
                digest.update(attribute.SerializeToString(deterministic=True))
            for name in self.reads(node):
                digest.update(b"\0" + reference(name))
            for index, name in enumerate(node.output):
                is_constant = name in self._tensors
                found[name] = self._leaf(name) if is_constant else digest.digest() + bytes([index % 256])
        return found

    def walk_back(self, output: str, cuts: Set[str]) -> tuple[list[NodeProto], set[str], list[str]]:
        """The nodes that compute a cut, the cuts and inputs they begin at, and the constants they read."""
        inputs: set[str] = set()
        constants: dict[str, None] = {}
        members: dict[int, NodeProto] = {}
        pending = [output]
        while pending:
            node = self.producers[pending.pop()]
            if id(node) in members:
                continue
            members[id(node)] = node
            for name in filter(None, self.reads(node)):
                if name in self._tensors:
                    constants[name] = None
                elif name in cuts or name not in self.producers:
                    inputs.add(name)
                else:
                    pending.append(name)
        ordered = sorted(members.values(), key=self._position)
        return ordered, inputs, list(constants)

    def hash(self, name: str) -> TensorHash:
        """Of a constant."""
        if name not in self._hashes:
            self._hashes[name] = _hash(name, self._tensors[name])
        return self._hashes[name]

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {id(node): position for position, node in enumerate(self.nodes)}

    def _position(self, node: NodeProto) -> int:
        return self._positions[id(node)]

    def _leaf(self, name: str) -> bytes:
        if name not in self._tensors:
            return b"input " + name.encode()
        found = self.hash(name)
        return f"constant {found.datatype} {found.shape} {found.sha256}".encode()


def _extent(original: _Side, folded: _Side, output: str, cuts: Set[str]) -> Extent:
    nodes, inputs, constants = original.walk_back(output, cuts)
    other_nodes, other_inputs, other_constants = folded.walk_back(output, cuts)
    computed = [name for node in nodes for name in node.output if name in original.computed]
    before = [original.hash(name) for name in constants]
    after = [folded.hash(name) for name in other_constants]
    return Extent(
        output=output,
        inputs=frozenset(inputs | other_inputs),
        tensors=tuple(name for name in computed if name == output or name not in folded.producers),
        before=tuple(_operators(nodes, original.computed)),
        after=tuple(_operators(other_nodes, folded.computed)),
        constants_before=_without(before, after),
        constants_after=_without(after, before),
    )


def _operators(nodes: Iterable[NodeProto], computed: Set[str]) -> Iterator[str]:
    return (node.op_type for node in nodes if not computed.isdisjoint(node.output))


def _without(tensors: list[TensorHash], others: list[TensorHash]) -> tuple[TensorHash, ...]:
    known = {tensor.sha256 for tensor in others}
    return tuple(tensor for tensor in tensors if tensor.sha256 not in known)


def _reads(node: NodeProto) -> list[str]:
    """Names that a node reads, those of the graph around its subgraphs included."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names += [name for inner in graph.node for name in _reads(inner)]
            names += [output.name for output in graph.output]
    return names


def _meaning(model: ModelProto) -> bytes:
    """What nodes alike in every other way may differ by: the versions of operators, functions, sparse constants."""
    digest = hashlib.sha256()
    for message in (*model.opset_import, *model.functions, *model.graph.sparse_initializer):
        digest.update(message.SerializeToString(deterministic=True))
    return digest.digest()


def _hash(name: str, tensor: TensorProto) -> TensorHash:
    if tensor.data_type == TensorProto.STRING:
        content = b"\0".join(tensor.string_data)
    else:
        content = numpy_helper.to_array(tensor).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    return TensorHash(name, tuple(tensor.dims), TensorProto.DataType.Name(tensor.data_type), digest)


__all__ = ["Extent", "common_tensors", "find_extents"]
