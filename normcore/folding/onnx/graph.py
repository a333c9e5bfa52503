"""An index over the nodes of one graph: who makes a tensor, who uses it, and whether it is constant."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from normcore.checkpoints.onnx import opset_of
from normcore.checkpoints.onnx_constants import EVALUATED, Value, evaluate, tensor_value
from normcore.checkpoints.onnx_shapes import infer_types
from normcore.checkpoints.onnx_structure import bodies, walk_graphs
from normcore.folding.onnx.refusal import Refusal

_MAX_ELEMENTS = 1 << 28
_MAX_CHAIN = 64
_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4


class Graph:
    """The top graph of a model, which rules read and rewrite in place; `commit` ends the rewriting.

    Nodes are known by their position, which stays valid until `commit`. Whatever a rewrite leaves without a use
    (constants, the nodes that computed them) is dropped at once.
    """

    def __init__(self, model: ModelProto, *, freeze_initializers: bool = False) -> None:
        self._model = model
        self._types = infer_types(model).top
        self._nodes: dict[int, NodeProto] = dict(enumerate(model.graph.node))
        self._producers: dict[str, int] = {}
        self._uses: defaultdict[str, list[int]] = defaultdict(list)
        self._initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {info.name for info in model.graph.output}
        self._inputs = {info.name for info in model.graph.input}
        self._overridable = set() if freeze_initializers else self._inputs & set(self._initializers)
        self._frozen = self._inputs & set(self._initializers) if freeze_initializers else set()
        self._new: dict[str, TensorProto] = {}
        self._gone: set[str] = set()
        self.opset = opset_of(model)
        self._names = {name for name in self._all_names() if name}
        for index, node in self._nodes.items():
            self._producers.update((name, index) for name in node.output if name)
            for name in used_names(node):
                self._uses[name].append(index)

    def nodes(self) -> Iterator[tuple[int, NodeProto]]:
        """Positions and nodes, in the order of the graph."""
        yield from list(self._nodes.items())

    def node(self, index: int) -> NodeProto:
        return self._nodes[index]

    def producer(self, name: str) -> int | None:
        """Position of the node that makes a tensor; None for inputs and initializers."""
        return self._producers.get(name)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape as far as the file determines it; None where even the rank is free."""
        found = self._types.get(name)
        return None if found is None else found.shape

    def is_constant(self, name: str) -> bool:
        try:
            self.constant(name)
        except Refusal:
            return False
        return True

    def constant(self, name: str) -> Value:
        """The value of a tensor that is the same in every run. Raises Refusal."""
        return self._resolve(name, {}, 0)

    def check_single_use(self, name: str, *, user: int) -> None:
        """Refuse a tensor that anyone but one input of one node can see. Raises Refusal."""
        if name in self._outputs:
            raise Refusal(f"{self.origin(name)} gives {name!r}, which is also an output of the graph")
        uses = self._uses[name]
        if uses != [user]:
            other = next((index for index in uses if index != user), user)
            raise Refusal(f"the output of {self.origin(name)} has a second consumer {label(self._nodes[other])}")

    def origin(self, name: str) -> str:
        """Words for what makes a tensor."""
        index = self.producer(name)
        if index is not None:
            return label(self._nodes[index])
        return f"initializer {name!r}" if name in self._initializers else f"graph input {name!r}"

    def take_over(self, index: int, inputs: Sequence[str], *, output: str) -> None:
        """Give a node new inputs and the name of a tensor that another node made until now."""
        node = self._nodes[index]
        self._producers.pop(node.output[0])
        self._gone.add(node.output[0])
        node.output[0] = output
        self._producers[output] = index
        self.rewire(index, inputs)

    def rewire(self, index: int, inputs: Sequence[str]) -> None:
        """Give a node new inputs; what only it used goes."""
        node = self._nodes[index]
        former = [name for name in node.input if name]
        node.input[:] = inputs
        for name in inputs:
            self._uses[name].append(index)
        self._release(former, index)

    def remove(self, index: int) -> None:
        """Drop a node, and what only it used."""
        node = self._nodes.pop(index)
        for name in node.output:
            if self._producers.get(name) == index:  # else another node has taken the name over
                del self._producers[name]
                self._gone.add(name)
        self._release(used_names(node), index)

    def store(self, array: NDArray[Any], *, instead_of: str, fallback: str) -> str:
        """Name of a new initializer: the old one's where nothing else can see that, else a fresh name.

        A shared weight is never changed: the node that asks gets its own copy.
        """
        is_private = (
            instead_of in self._initializers
            and len(self._uses[instead_of]) == 1
            and instead_of not in self._outputs
            and instead_of not in self._overridable
        )
        name = instead_of if is_private else self._fresh(fallback)
        tensor = numpy_helper.from_array(np.array(array, order="C"), name)
        self._initializers[name] = tensor
        self._new[name] = tensor
        return name

    def commit(self) -> None:
        """Write everything back into the model, after which the index is spent."""
        graph = self._model.graph
        for index in reversed(range(len(graph.node))):
            if index not in self._nodes:
                del graph.node[index]
        old = {tensor.name for tensor in graph.initializer}
        _drop(graph.initializer, self._gone - set(self._new))
        for tensor in graph.initializer:
            if tensor.name in self._new:
                tensor.CopyFrom(self._new[tensor.name])
        graph.initializer.extend(tensor for name, tensor in self._new.items() if name not in old)
        stale = (self._gone | set(self._new)) - set(self._producers)
        _drop(graph.value_info, stale)
        _drop(graph.input, self._frozen)
        if self._frozen or self._new:
            # Older files must list every initializer among the inputs.
            self._model.ir_version = max(self._model.ir_version, _FIRST_IR_WITH_PRIVATE_INITIALIZERS)

    def _resolve(self, name: str, known: dict[str, Value], depth: int) -> Value:
        if name not in known:
            known[name] = self._initializer(name) if name in self._initializers else self._computed(name, known, depth)
        return known[name]

    def _initializer(self, name: str) -> Value:
        if name in self._overridable:
            raise Refusal(
                f"initializer {name!r} is also a graph input, which callers may override; "
                "the option freeze_initializers removes such inputs"
            )
        value = tensor_value(self._initializers[name], max_elements=_MAX_ELEMENTS)
        if value is None:
            raise Refusal(f"initializer {name!r} is no numeric tensor of usable size")
        return value

    def _computed(self, name: str, known: dict[str, Value], depth: int) -> Value:
        index = self.producer(name)
        if index is None:
            raise Refusal(f"{name!r} is given by the caller")
        node = self._nodes[index]
        if depth == _MAX_CHAIN or node.op_type not in EVALUATED or len(node.output) != 1:
            raise Refusal(f"{name!r} is computed at run time by {label(node)}")
        operands = [self._operand(node, slot, known, depth) for slot in range(len(node.input))]
        shape = self.shape(node.input[0]) if node.input else None
        value = evaluate(node, operands, shape, max_elements=_MAX_ELEMENTS)
        if value is None:
            raise Refusal(f"{name!r} is computed at run time by {label(node)}")
        return value

    def _operand(self, node: NodeProto, slot: int, known: dict[str, Value], depth: int) -> Value | None:
        name = node.input[slot]
        if not name or node.op_type in ("Shape", "Size"):
            return None
        if node.op_type == "CastLike" and slot == 1:
            found = self._types.get(name)
            return None if found is None else np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(found.data_type))
        return self._resolve(name, known, depth + 1)

    def _release(self, names: Sequence[str], index: int) -> None:
        """Forget one use of each name; what has no use left goes, unless somebody outside can see it."""
        for name in names:
            self._uses[name].remove(index)
            if self._uses[name] or name in self._outputs or name in self._overridable:
                continue
            if name in self._initializers:
                del self._initializers[name]
                self._new.pop(name, None)
                self._gone.add(name)
                continue
            producer = self.producer(name)
            if producer is not None and not self._is_used(self._nodes[producer]):
                self.remove(producer)

    def _is_used(self, node: NodeProto) -> bool:
        return any(self._uses[name] or name in self._outputs for name in node.output if name)

    def _fresh(self, wanted: str) -> str:
        name = wanted
        counter = 1
        while name in self._names:
            counter += 1
            name = f"{wanted}_{counter}"
        self._names.add(name)
        return name

    def _all_names(self) -> Iterator[str]:
        for graph, _ in walk_graphs(self._model.graph):
            for node in graph.node:
                yield from node.input
                yield from node.output
            for group in (graph.input, graph.output, graph.initializer, graph.value_info):
                yield from (item.name for item in group)
            yield from (sparse.values.name for sparse in graph.sparse_initializer)


def label(node: NodeProto) -> str:
    """Words for a node: its operator, and its name or the tensor it makes."""
    name = node.name or next((output for output in node.output if output), "")
    return f"{node.op_type} {name!r}"


def used_names(node: NodeProto) -> list[str]:
    """Every name a node reads, once per input; whatever its subgraphs mention counts, as they see the names around."""
    names = [name for name in node.input if name]
    for body in bodies(node):
        for graph, _ in walk_graphs(body):
            names.extend(name for inner in graph.node for name in inner.input if name)
            names.extend(info.name for info in graph.output)
    return names


def _drop(items: Any, names: set[str]) -> None:
    """Delete the entries of a repeated field that have one of these names."""
    for index in reversed(range(len(items))):
        if items[index].name in names:
            del items[index]


__all__ = ["Graph", "label", "used_names"]
