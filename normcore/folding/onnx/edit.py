"""What a rule has decided to write, computed and checked before anything is written."""

from dataclasses import dataclass, field

import numpy as np

from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.rounding import Stored


@dataclass(frozen=True, slots=True)
class Padding:
    """A Pad of a convolution's input: widths as ONNX lists them, what it fills in, and what is added to the result."""

    pads: tuple[int, ...]
    value: Stored
    border: Stored | None

    @property
    def inserted(self) -> int:
        return 1 if self.border is None else 2

    @property
    def residual(self) -> float:
        return max(part.residual for part in (self.value, self.border) if part is not None)

    def write(self, graph: Graph, name: str, stem: str) -> str:
        """Insert it behind a tensor; name of the padded tensor."""
        pads = graph.store(np.asarray(self.pads, np.int64), instead_of="", fallback=f"{stem}.pads")
        value = graph.store(self.value.array, instead_of="", fallback=f"{stem}.padding")
        padded = graph.fresh(f"{name}_padded")
        graph.insert("Pad", [name, pads, value], padded, like="")
        if self.border is None:
            return padded
        border = graph.store(self.border.array, instead_of="", fallback=f"{stem}.border")
        framed = graph.fresh(f"{name}_framed")
        graph.insert("Add", [padded, border], framed, like="")
        return framed


@dataclass(frozen=True, slots=True)
class Edit:
    """New constants of one node.

    Attributes:
        index: the node.
        rule: name of the rule that decided.
        formula: what is written, in words of folding.
        operands: new constants by input slot.
        addend: what is added to the output by an operator of its own, where the node has no input for it.
        padding: what stands in front of the node instead of its own padding.
        operator: what the node becomes; None where it stays what it is.
        resets: attributes that go back to their default.
        changes_output: whether the node's output is another tensor now.
        follow: what is written with it.
    """

    index: int
    rule: str
    formula: str
    operands: dict[int, Stored] = field(default_factory=dict)
    addend: Stored | None = None
    padding: "Padding | None" = None
    operator: str | None = None
    resets: tuple[str, ...] = ()
    changes_output: bool = False
    follow: "Edit | None" = None

    @property
    def residual(self) -> float:
        stored = [*self.operands.values(), *([] if self.addend is None else [self.addend])]
        parts = [part for part in (self.follow, self.padding) if part is not None]
        return max((part.residual for part in [*stored, *parts]), default=0.0)

    @property
    def inserted(self) -> int:
        return int(self.addend is not None) + (0 if self.padding is None else self.padding.inserted)

    def rewrite(self, graph: Graph) -> None:
        node = graph.node(self.index)
        inputs = [*node.input, *[""] * (1 + max(self.operands, default=0) - len(node.input))]
        stem = self._stem(list(node.input))
        for slot, stored in self.operands.items():
            old = inputs[slot]
            fallback = f"{old}_folded" if old else f"{stem}.bias"
            inputs[slot] = graph.store(stored.array, instead_of=old, fallback=fallback)
        if self.operator is not None:
            node.op_type = self.operator
        reset_attributes(graph, self.index, self.resets)
        if self.padding is not None:
            inputs[0] = self.padding.write(graph, inputs[0], stem)
        graph.set_inputs(self.index, inputs)
        if self.addend is not None:
            name = graph.store(self.addend.array, instead_of="", fallback=f"{stem}.bias")
            graph.append_addition(self.index, name)
        if self.changes_output:
            graph.rename_changed(node.output[0])
        if self.follow is not None:
            self.follow.rewrite(graph)

    def _stem(self, inputs: list[str]) -> str:
        weight = inputs[1] if len(inputs) > 1 else inputs[0]
        return weight.removesuffix("_folded").removesuffix(".weight")


def reset_attributes(graph: Graph, index: int, names: tuple[str, ...]) -> None:
    """Leave attributes at their default."""
    node = graph.node(index)
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    copies = [type(attribute).FromString(attribute.SerializeToString()) for attribute in kept]
    del node.attribute[:]
    node.attribute.extend(copies)


def along(vector: np.ndarray, *, axis: int, rank: int) -> np.ndarray:
    """A vector as a constant that broadcasts over every axis of a tensor but one."""
    return vector.reshape(-1, *[1] * (rank - 1 - axis))


__all__ = ["Edit", "along", "reset_attributes"]
