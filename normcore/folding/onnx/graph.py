"""An index over the nodes of one graph: who makes a tensor, who uses it, and whether it is constant."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from normcore.checkpoints.onnx import opset_of
from normcore.checkpoints.onnx_constants import Value
from normcore.checkpoints.onnx_shapes import TensorType, infer_types
from normcore.folding.onnx.constants import Constants, label
from normcore.folding.onnx.names import all_names, used_names
from normcore.folding.onnx.ordering import drop, fill, write_nodes
from normcore.folding.onnx.refusal import Refusal

_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
_CAPTURED = -1
_SHAPES = frozenset({"Shape", "Size"})


class Graph:
    """The top graph of a model, which rules read and rewrite in place; `commit` ends the rewriting.

    Nodes are known by their position, which stays valid until `commit`; new nodes come behind. Whatever a rewrite
    leaves without a use (constants, the nodes that computed them) is dropped at once. A name means the same tensor
    before and after: what gets another value gets another name.
    """

    def __init__(self, model: ModelProto, *, freeze_initializers: bool = False, locked: Collection[str] = ()) -> None:
        self._model = model
        self._nodes: dict[int, NodeProto] = dict(enumerate(model.graph.node))
        self._next = len(self._nodes)
        self._producers: dict[str, int] = {}
        self._uses: defaultdict[str, list[int]] = defaultdict(list)
        self._initializers: dict[str, TensorProto | Value] = {each.name: each for each in model.graph.initializer}
        self._outputs = {info.name for info in model.graph.output}
        listed = {info.name for info in model.graph.input} & set(self._initializers)
        self._overridable = set() if freeze_initializers else listed
        self._types = dict(infer_types(model, overridable=self._overridable).top)
        self._frozen = listed if freeze_initializers else set()
        self._new: dict[str, Value] = {}
        self._gone: set[str] = set()
        self._locked = frozenset(locked)
        self.opset = opset_of(model)
        self._names = {name for name in all_names(model.graph) if name}
        for index, node in self._nodes.items():
            self._enter(index, node)
        self._constants = Constants(self._initializers, self._overridable, self._types, self._producing)

    def nodes(self) -> Iterator[tuple[int, NodeProto]]:
        """Positions and nodes, in the order of the graph; new ones last."""
        yield from list(self._nodes.items())

    def node(self, index: int) -> NodeProto:
        return self._nodes[index]

    def __contains__(self, index: int) -> bool:
        return index in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def producer(self, name: str) -> int | None:
        """Position of the node that makes a tensor; None for inputs and initializers."""
        return self._producers.get(name)

    def consumers(self, name: str, *, with_shapes: bool = False) -> list[tuple[int, int]]:
        """Position and slot of every use; the slot is -1 where a subgraph reads the tensor.

        Who asks for its shape alone does not count, as no fold changes that, unless `with_shapes`.
        """
        sites = []
        for index in dict.fromkeys(self._uses[name] if with_shapes else self._readers(name)):
            slots = [slot for slot, used in enumerate(self._nodes[index].input) if used == name]
            captured = self._uses[name].count(index) > len(slots)
            sites += [(index, slot) for slot in [*slots, *[_CAPTURED] * captured]]
        return sites

    def is_output(self, name: str) -> bool:
        return name in self._outputs

    def is_locked(self, index: int) -> bool:
        """Whether the caller wants a node left as it is."""
        return not self._locked.isdisjoint(self._nodes[index].output)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape as far as the file determines it; None where even the rank is free."""
        found = self._types.get(name)
        return None if found is None else found.shape

    def rank(self, name: str) -> int | None:
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """Datatype; None where the file leaves it free."""
        found = self._types.get(name)
        if found is None or not found.data_type:
            return None
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(found.data_type))

    def is_constant(self, name: str) -> bool:
        return self._constants.knows(name)

    def constant(self, name: str) -> Value:
        """The value of a tensor that is the same in every run. Raises Refusal."""
        return self._constants.resolve(name)

    def check_single_use(self, name: str, *, user: int) -> None:
        """Refuse a tensor that anyone but one input of one node can see. Raises Refusal."""
        if name in self._outputs:
            raise Refusal(f"{self.origin(name)} gives {name!r}, which is also an output of the graph")
        uses = self._readers(name)
        if uses != [user]:
            other = next((index for index in uses if index != user), user)
            raise Refusal(f"the output of {self.origin(name)} has a second consumer {label(self._nodes[other])}")

    def origin(self, name: str) -> str:
        """Words for what makes a tensor."""
        index = self.producer(name)
        if index is not None:
            return label(self._nodes[index])
        return f"initializer {name!r}" if name in self._initializers else f"graph input {name!r}"

    def has_other_results(self, name: str) -> bool:
        """Whether the node that makes a tensor makes others too that somebody sees."""
        return self._is_used(self._nodes[self._producers[name]], but=name)

    def set_inputs(self, index: int, inputs: Sequence[str]) -> None:
        """Give a node other inputs."""
        node = self._nodes[index]
        former = list(node.input)
        node.input[:] = inputs
        for name in filter(None, inputs):
            self._uses[name].append(index)
        self._release([name for name in former if name], index)

    def insert(self, operator: str, inputs: Sequence[str], output: str, *, like: str, **attributes: Any) -> int:
        """A new node, whose output is of the datatype and rank of another tensor."""
        index, self._next = self._next, self._next + 1
        name = self.fresh(f"{output}/{operator}")
        node = onnx.helper.make_node(operator, list(inputs), [output], name=name, **attributes)
        self._nodes[index] = node
        self._enter(index, node)
        if like in self._types:
            self._types.setdefault(output, self._types[like])
        return index

    def rename(self, name: str, new: str) -> None:
        """Another name for what a node makes, everywhere; a node that makes `new` already is about to go."""
        producer = self._producers.pop(name)
        outputs = self._nodes[producer].output
        outputs[list(outputs).index(name)] = new
        self._producers[new] = producer
        self._gone.add(name)
        if name in self._types:
            self._types.setdefault(new, self._types[name])
        self.replace_uses(name, new)

    def rename_changed(self, name: str) -> str:
        """A fresh name for a tensor whose value changes."""
        new = self.fresh(f"{name}_folded")
        self.rename(name, new)
        return new

    def replace_uses(self, name: str, new: str) -> None:
        """Make every node that reads a tensor read another one."""
        for index in self._uses.pop(name, []):
            node = self._nodes[index]
            node.input[:] = [new if used == name else used for used in node.input]
            self._uses[new].append(index)

    def bypass(self, index: int, slot: int) -> None:
        """Drop a node that passes one input on: who read its output reads that input."""
        node = self._nodes[index]
        self.replace_uses(node.output[0], node.input[slot])
        self.remove(index)

    def replace(self, index: int, *, by: str) -> None:
        """Drop a node; the tensor `by`, which another node makes, takes over the name of its output."""
        self.rename(by, self._nodes[index].output[0])
        self.remove(index)

    def substitute(self, index: int, slot: int, chain: Sequence[tuple[str, str]]) -> list[int]:
        """Put elementwise operators, each with its constant, in the place of a node; its output keeps its name."""
        node = self._nodes[index]
        output, source = node.output[0], node.input[slot]
        former = self.rename_changed(output)
        made = []
        name = source
        for step, (operator, constant) in enumerate(chain, start=1):
            result = output if step == len(chain) else self.fresh(f"{output}/{operator.lower()}")
            made.append(self.insert(operator, [name, constant], result, like=source))
            name = result
        self.replace_uses(former, output)
        self.remove(index)
        return made

    def append_addition(self, index: int, constant: str) -> None:
        """An Add of a constant behind a node, which takes over the name of the node's output."""
        output = self._nodes[index].output[0]
        summand = self.rename_changed(output)
        self.replace_uses(summand, output)
        self.insert("Add", [summand, constant], output, like=summand)
        self._gone.discard(output)

    def remove(self, index: int) -> None:
        """Drop a node, and what only it used."""
        node = self._nodes.pop(index)
        for name in node.output:
            if name and self._producers.get(name) == index:  # else another node has taken the name over
                del self._producers[name]
                self._gone.add(name)
        self._release(used_names(node), index)

    def store(self, array: NDArray[Any], *, instead_of: str, fallback: str) -> str:
        """Name of a new initializer: the old one's where nothing else can see that, else a fresh name.

        A shared weight is never changed: the node that asks gets its own copy.
        """
        is_visible = instead_of in self._outputs or instead_of in self._overridable
        is_private = instead_of in self._initializers and len(self._uses[instead_of]) == 1 and not is_visible
        name = instead_of if is_private else self.fresh(fallback)
        self._initializers[name] = self._new[name] = array
        self._types[name] = TensorType(onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        return name

    def bake(self, name: str, array: NDArray[Any]) -> None:
        """Make a computed tensor, the only result of its node, an initializer of the same name."""
        producer = self._producers.pop(name)
        self._initializers[name] = self._new[name] = array
        self.remove(producer)

    def fresh(self, wanted: str) -> str:
        """A name that nothing has."""
        name = wanted
        counter = 1
        while name in self._names:
            counter += 1
            name = f"{wanted}_{counter}"
        self._names.add(name)
        return name

    def commit(self) -> None:
        """Write everything back into the model, after which the index is spent."""
        graph = self._model.graph
        write_nodes(graph, self._nodes)
        known = {tensor.name for tensor in graph.initializer}
        unused = {name for name in known - self._outputs - self._overridable if not self._uses[name]}
        drop(graph.initializer, (self._gone | unused) - set(self._new))
        drop(graph.value_info, (self._gone | unused | set(self._new)) - set(self._producers))
        drop(graph.input, self._frozen)
        has_new = bool(self._new)
        self._initializers.clear()  # each weight is let go as it is written: together they are as large as the file
        for tensor in graph.initializer:
            if tensor.name in self._new:
                fill(tensor, tensor.name, self._new.pop(tensor.name))
        for name in list(self._new):
            fill(graph.initializer.add(), name, self._new.pop(name))
        if self._frozen or has_new:
            # Older files must list every initializer among the inputs.
            self._model.ir_version = max(self._model.ir_version, _FIRST_IR_WITH_PRIVATE_INITIALIZERS)

    def _enter(self, index: int, node: NodeProto) -> None:
        self._producers.update((name, index) for name in node.output if name)
        for name in used_names(node):
            self._uses[name].append(index)

    def _readers(self, name: str) -> list[int]:
        return [index for index in self._uses[name] if self._nodes[index].op_type not in _SHAPES]

    def _producing(self, name: str) -> NodeProto | None:
        index = self.producer(name)
        return None if index is None else self._nodes[index]

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

    def _is_used(self, node: NodeProto, *, but: str = "") -> bool:
        return any(self._uses[name] or name in self._outputs for name in node.output if name and name != but)


__all__ = ["Graph", "label"]
