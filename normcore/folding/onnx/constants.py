"""Values of a graph that are the same in every run, however they are computed."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from normcore.checkpoints.onnx_constants import EVALUATED, Value, evaluate, tensor_value
from normcore.checkpoints.onnx_shapes import TensorType
from normcore.folding.onnx.refusal import Refusal

_MAX_ELEMENTS = 1 << 28
_MAX_CHAIN = 64


class Constants:
    """Resolves names to values; knows initializers, and nodes that compute from nothing else."""

    def __init__(
        self,
        initializers: Mapping[str, TensorProto | Value],
        overridable: set[str],
        types: Mapping[str, TensorType],
        producer: Callable[[str], NodeProto | None],
    ) -> None:
        self._initializers = initializers
        self._overridable = overridable
        self._types = types
        self._producer = producer

    def resolve(self, name: str) -> Value:
        """The value of a tensor. Raises Refusal where a run or a caller decides it."""
        return self._resolve(name, {}, 0)

    def knows(self, name: str) -> bool:
        """Whether a tensor is the same in every run."""
        try:
            self.resolve(name)
        except Refusal:
            return False
        return True

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
        held = self._initializers[name]
        value = held if isinstance(held, np.ndarray) else tensor_value(held, max_elements=_MAX_ELEMENTS)
        if value is None:
            raise Refusal(f"initializer {name!r} is no numeric tensor of usable size")
        return value

    def _computed(self, name: str, known: dict[str, Value], depth: int) -> Value:
        node = self._producer(name)
        if node is None:
            raise Refusal(f"{name!r} is given by the caller")
        if depth == _MAX_CHAIN or node.op_type not in EVALUATED or node.output[0] != name:
            raise Refusal(f"{name!r} is computed at run time by {label(node)}")
        operands = [self._operand(node, slot, known, depth) for slot in range(len(node.input))]
        found = self._types.get(node.input[0]) if node.input else None
        shape = None if found is None else found.shape
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


def label(node: NodeProto) -> str:
    """Words for a node: its operator, and its name or the tensor it makes."""
    name = node.name or next((output for output in node.output if output), "")
    return f"{node.op_type} {name!r}"


__all__ = ["Constants", "label"]
