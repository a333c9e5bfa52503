"""Values that a graph computes from constants alone: parameters hidden behind Identity, Cast, Expand and the like.

Every operator here is evaluated with numpy as ONNX defines it, and only when the result has at most as many elements
as the caller allows: a file of a hundred bytes can ask for gigabytes.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from normcore.checkpoints.onnx_arithmetic import ARITHMETIC, Attributes, Function, Value
from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS, count_elements

Shape = tuple[int | None, ...]
Operands = Sequence[Value | None]


def tensor_value(tensor: TensorProto, *, max_elements: int) -> Value | None:
    """The array a tensor holds, in its own datatype; None for strings and for tensors over the bound."""
    if tensor.data_type == TensorProto.STRING or count_elements(tuple(tensor.dims)) > max_elements:
        return None
    return numpy_helper.to_array(tensor)


def evaluate(node: NodeProto, operands: Operands, shape: Shape | None, *, max_elements: int) -> Value | None:
    """The first output of a node, or None where it is not constant, not supported or too large.

    Args:
        node: any node.
        operands: the value of each input, None where it is unknown or absent.
        shape: shape of the first input as far as it is known without its value; only Shape and Size ask for it.
        max_elements: bound on the elements of the result.
    """
    if node.domain not in STANDARD_DOMAINS:
        return None
    attributes = {
        attribute.name: onnx.helper.get_attribute_value(attribute)
        for attribute in node.attribute
        if not attribute.ref_attr_name
    }
    if node.op_type == "Constant":
        return _constant(attributes, max_elements)
    if node.op_type in ("Shape", "Size"):
        return _shape_of(node.op_type, attributes, shape)
    function = None if _is_another_batch_norm(node, attributes) else _FUNCTIONS.get(node.op_type)
    known = [operand for operand in operands if operand is not None]
    if function is None or not known or len(known) != len(node.input):
        return None
    if sum(operand.size for operand in known) > max_elements:
        return None
    try:
        with np.errstate(all="ignore"):
            return function(known, attributes, max_elements)
    except (ValueError, LookupError, TypeError, ArithmeticError):
        return None  # an ill-formed constant is no constant: whoever runs the graph reports it


def _is_another_batch_norm(node: NodeProto, attributes: Attributes) -> bool:
    """Of old opsets: statistics by position; training mode, which listing the statistics as outputs asks for."""
    is_training = len(node.output) > 1 and not attributes.get("training_mode", 0)
    return node.op_type == "BatchNormalization" and (is_training or not attributes.get("spatial", 1))


def _constant(attributes: Attributes, max_elements: int) -> Value | None:
    if "value" in attributes:
        return tensor_value(attributes["value"], max_elements=max_elements)
    for name, dtype in _SCALARS.items():
        if name in attributes and np.size(attributes[name]) <= max_elements:
            return np.asarray(attributes[name], dtype)
    return None


def _shape_of(operator: str, attributes: Attributes, shape: Shape | None) -> Value | None:
    if shape is None:
        return None
    wanted = shape[attributes.get("start", 0) : attributes.get("end", len(shape))] if operator == "Shape" else shape
    sizes = tuple(size for size in wanted if size is not None)
    if len(sizes) < len(wanted):
        return None
    return np.asarray(sizes if operator == "Shape" else count_elements(sizes), np.int64)


def _cast(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    return operands[0].astype(onnx.helper.tensor_dtype_to_np_dtype(attributes["to"]))


def _constant_of_shape(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    shape = _bounded(operands[0], max_elements)
    if shape is None:
        return None
    fill = numpy_helper.to_array(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    return np.broadcast_to(fill.reshape(()), shape)


def _expand(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    requested = _bounded(operands[1], max_elements)
    if requested is None:
        return None
    shape = np.broadcast_shapes(operands[0].shape, requested)
    return np.broadcast_to(operands[0], shape) if count_elements(shape) <= max_elements else None


def _gather(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    axis = attributes.get("axis", 0)
    sizes = operands[0].shape[:axis] + operands[1].shape + operands[0].shape[axis:][1:]
    return np.take(operands[0], operands[1], axis=axis) if count_elements(sizes) <= max_elements else None


def _range(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    start, limit, delta = (operand.reshape(()) for operand in operands)
    count = max(0, int(np.ceil((float(limit) - float(start)) / float(delta))))
    return start + np.arange(count, dtype=start.dtype) * delta if count <= max_elements else None


def _slice(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    names = ("starts", "ends", "axes", "steps")
    given = dict(zip(names, operands[1:], strict=False)) if len(operands) > 1 else attributes
    starts, ends = given["starts"], given["ends"]
    axes = given.get("axes", range(len(starts)))
    steps = given.get("steps", [1] * len(starts))
    index = [slice(None)] * operands[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = operands[0].shape[axis]
        # numpy clamps as ONNX does, but for a start before the first element of what is reversed, and counts an end
        # there from the back.
        first = max(int(start), -size) if step < 0 else int(start)
        index[axis] = slice(first, None if step < 0 and end < -size else int(end), int(step))
    return operands[0][tuple(index)]


def _squeeze(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    axes = _axes(operands, attributes)
    return np.squeeze(operands[0], axis=axes)


def _unsqueeze(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    axes = _axes(operands, attributes)
    return None if axes is None else np.expand_dims(operands[0], axes)


def _axes(operands: Sequence[Value], attributes: Attributes) -> tuple[int, ...] | None:
    axes = operands[1].reshape(-1).tolist() if len(operands) > 1 else attributes.get("axes")
    return None if axes is None else tuple(int(axis) for axis in axes)


def _reshape(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    sizes = [int(size) for size in operands[1].reshape(-1)]
    if not attributes.get("allowzero", 0):
        sizes = [operands[0].shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return operands[0].reshape(sizes)


def _transpose(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    return np.transpose(operands[0], attributes.get("perm"))


def _concat(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    return np.concatenate(operands, axis=attributes["axis"])


def _bounded(sizes: Value, max_elements: int) -> tuple[int, ...] | None:
    """A computed shape, unless it asks for too much."""
    shape = tuple(int(size) for size in sizes.reshape(-1))
    return shape if min(shape, default=0) >= 0 and count_elements(shape) <= max_elements else None


_SCALARS: dict[str, type[np.generic]] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}
_FUNCTIONS: dict[str, Function] = {
    "Identity": lambda operands, attributes, max_elements: operands[0],
    "Cast": _cast,
    "CastLike": lambda operands, attributes, max_elements: operands[0].astype(operands[1].dtype),
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "Range": _range,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    **ARITHMETIC,
}

EVALUATED = frozenset(_FUNCTIONS) | {"Constant", "Shape", "Size"}
"""Operators that `evaluate` knows."""

__all__ = ["EVALUATED", "Shape", "Value", "evaluate", "tensor_value"]
