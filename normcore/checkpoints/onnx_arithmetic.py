"""Arithmetic on constants as ONNX defines it: what weight and spectral norm, standardization, decomposed norms need.

Floating point is computed in float64 and rounded once, to the datatype of the first operand. A result that would have
more than `max_elements`, or a product that would take more multiplications than that, is None.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normcore.checkpoints.onnx_structure import count_elements

Value = NDArray[Any]
Attributes = Mapping[str, Any]
Function = Callable[[Sequence[Value], Attributes, int], Value | None]


def divide(left: Value, right: Value) -> Value:
    if np.issubdtype(left.dtype, np.integer):
        return np.asarray(np.abs(left) // np.abs(right) * np.sign(left) * np.sign(right))  # towards zero
    return np.asarray(left / right)


def elementwise(function: Callable[..., Value]) -> Function:
    """A function of operands that broadcast."""

    def apply(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
        if count_elements(np.broadcast_shapes(*(operand.shape for operand in operands))) > max_elements:
            return None
        return np.asarray(function(*operands))

    return apply


def _exact(function: Callable[..., Value]) -> Function:
    """The same in float64."""
    return elementwise(lambda *operands: _narrow(function(*map(_wide, operands)), operands[0].dtype))


def _reduce(function: Callable[[Value, tuple[int, ...] | None, bool], Value]) -> Function:
    def apply(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
        axes = operands[1].reshape(-1).tolist() if len(operands) > 1 else attributes.get("axes")
        is_kept = not axes and attributes.get("noop_with_empty_axes", 0)  # each element then is a sum of its own
        wanted = () if is_kept else tuple(int(axis) for axis in axes) if axes else None
        result = function(_wide(operands[0]), wanted, bool(attributes.get("keepdims", 1)))
        return _narrow(np.asarray(result), operands[0].dtype)

    return apply


def _modulo(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    function = np.fmod if attributes.get("fmod", 0) else np.mod
    return elementwise(function)(operands, attributes, max_elements)


def _matmul(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    left, right = operands
    columns = right.shape[-1] if right.ndim > 1 else 1
    batch = count_elements(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    rows = left.shape[-2] if left.ndim > 1 else 1
    if max(1, batch) * rows * left.shape[-1] * columns > max_elements:
        return None
    return _narrow(np.asarray(_wide(left) @ _wide(right)), left.dtype)


def _where(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    condition, chosen, other = operands
    if count_elements(np.broadcast_shapes(condition.shape, chosen.shape, other.shape)) > max_elements:
        return None
    return np.where(condition, chosen, other)


def _flatten(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    axis = int(attributes.get("axis", 1))
    front = operands[0].shape[: axis if axis >= 0 else axis + operands[0].ndim]
    return operands[0].reshape(count_elements(front), -1)


def _lp_normalization(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    x, axis = _wide(operands[0]), int(attributes.get("axis", -1))
    order = int(attributes.get("p", 2))
    norm = np.abs(x).sum(axis=axis, keepdims=True) if order == 1 else np.sqrt((x * x).sum(axis=axis, keepdims=True))
    return _narrow(np.divide(x, norm, out=np.zeros_like(x), where=norm != 0), operands[0].dtype)


def _batch_normalization(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    """In training mode with the statistics of the constant itself: how weight standardization is exported."""
    x, weight, bias, mean, var = (_wide(operand) for operand in operands)
    shape = (-1, *[1] * (x.ndim - 2))
    if attributes.get("training_mode", 0):
        axes = (0, *range(2, x.ndim))
        mean, var = x.mean(axis=axes), x.var(axis=axes)
    eps = float(attributes.get("epsilon", np.float32(1e-5)))
    standard = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    return _narrow(standard * weight.reshape(shape) + bias.reshape(shape), operands[0].dtype)


def _instance_normalization(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    x, weight, bias = (_wide(operand) for operand in operands)
    axes, shape = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    eps = float(attributes.get("epsilon", np.float32(1e-5)))
    standard = (x - x.mean(axis=axes, keepdims=True)) / np.sqrt(x.var(axis=axes, keepdims=True) + eps)
    return _narrow(standard * weight.reshape(shape) + bias.reshape(shape), operands[0].dtype)


def _clip(operands: Sequence[Value], attributes: Attributes, max_elements: int) -> Value | None:
    low = operands[1] if len(operands) > 1 else attributes.get("min", -np.inf)
    high = operands[2] if len(operands) > 2 else attributes.get("max", np.inf)
    return np.clip(operands[0], low, high).astype(operands[0].dtype)


def _wide(operand: Value) -> Value:
    return operand if operand.dtype.kind in "iub" else operand.astype(np.float64)


def _narrow(result: Value, dtype: np.dtype[Any]) -> Value:
    return result.astype(dtype)


ARITHMETIC: dict[str, Function] = {
    "Add": elementwise(np.add),
    "Sub": elementwise(np.subtract),
    "Mul": elementwise(np.multiply),
    "Div": elementwise(divide),
    "Mod": _modulo,
    "Pow": _exact(np.power),
    "Max": elementwise(lambda *operands: np.max(np.broadcast_arrays(*operands), axis=0)),
    "Min": elementwise(lambda *operands: np.min(np.broadcast_arrays(*operands), axis=0)),
    "Equal": elementwise(np.equal),
    "Where": _where,
    "Neg": elementwise(np.negative),
    "Abs": elementwise(np.abs),
    "Sqrt": _exact(np.sqrt),
    "Reciprocal": _exact(np.reciprocal),
    "Exp": _exact(np.exp),
    "Log": _exact(np.log),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axis=axes, keepdims=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axis=axes, keepdims=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.max(axis=axes, keepdims=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.min(axis=axes, keepdims=keep)),
    "ReduceL1": _reduce(lambda x, axes, keep: np.abs(x).sum(axis=axes, keepdims=keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: np.sqrt(np.square(x).sum(axis=axes, keepdims=keep))),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: np.square(x).sum(axis=axes, keepdims=keep)),
    "Clip": _clip,
    "LpNormalization": _lp_normalization,
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    "MatMul": _matmul,
    "Flatten": _flatten,
}

__all__ = ["ARITHMETIC", "Attributes", "Function", "Value"]
