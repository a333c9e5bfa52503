"""Checks of arguments; each error names the argument, what was expected and what came."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normcore.errors import DtypeError, NotSupportedError, ParameterError, ShapeError, StatisticsError

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_EXACT = 2**53  # up to here float64 holds every whole number
_LARGEST_COUNT = 2**62  # far from where one more would wrap
INTEGERS_RULE = 'an integer, or integers with commas between them, such as "2,3"'
_LARGEST_INTEGER = 10**18
_SHOWN_CHARACTERS = 80
_INTEGERS = re.compile(r"\s*[+-]?[0-9]{1,18}\s*(,\s*[+-]?[0-9]{1,18}\s*)*")


def check_floating(argument: str, tensor: Tensor) -> None:
    """Refuse everything but tensors of float16, bfloat16, float32 and float64."""
    if getattr(tensor, "dtype", None) not in _FLOATING:
        check_dense(argument, tensor)
        expected = "float16, bfloat16, float32 or float64"
        raise DtypeError(argument, expected=expected, received=_dtype_name(tensor))


def check_dense(argument: str, tensor: Tensor) -> None:
    """Refuse what is no tensor, and a tensor of another layout than strides."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(argument, expected="a tensor", received=shown(type(tensor).__name__))
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise DtypeError(argument, expected="a dense tensor", received=f"one of layout {layout}")


def check_rank(argument: str, tensor: Tensor, *, minimum: int) -> None:
    """Refuse too few dimensions, and tensors that are not dense."""
    if tensor.layout is not torch.strided:
        check_dense(argument, tensor)
    if tensor.ndim < minimum:
        expected = f"at least {minimum} dimensions"
        raise ShapeError(argument, expected=expected, received=f"shape {tuple(tensor.shape)}")


def check_axis(argument: str, axis: int, *, rank: int) -> int:
    """The axis counted from the front; a negative one counts from the back."""
    _check_is_number(argument, axis, "an integer")
    if not isinstance(axis, int) or not -rank <= axis < rank:
        expected = f"an integer from {-rank} to {rank - 1} for an input of {rank} dimensions"
        raise ParameterError(argument, expected=expected, received=shown(axis))
    return axis % rank


def check_integers(argument: str, value: object) -> tuple[int, ...]:
    """The integers of a text such as "2,3", which is how a list travels among scalar parameters, or of a sequence.

    A single integer is a sequence of one.
    """
    if isinstance(value, str) and _INTEGERS.fullmatch(value):
        return tuple(int(part) for part in value.split(","))
    integers = [value] if isinstance(value, int) else value
    if isinstance(integers, list | tuple) and integers and all(_is_small_integer(part) for part in integers):
        return tuple(integers)
    raise ParameterError(argument, expected=INTEGERS_RULE, received=shown(value))


def _is_small_integer(value: object) -> bool:
    return type(value) is int and abs(value) < _LARGEST_INTEGER


def check_axes(argument: str, value: str | int | Sequence[int], *, rank: int) -> tuple[int, ...]:
    """Different axes in ascending order, counted from the front."""
    axes = sorted(check_axis(argument, axis, rank=rank) for axis in check_integers(argument, value))
    if len(set(axes)) < len(axes):
        raise ParameterError(argument, expected=f"different axes for an input of rank {rank}", received=shown(value))
    return tuple(axes)


def check_shape(argument: str, tensor: Tensor, shape: Sequence[int], *, meaning: str) -> None:
    """Refuse what is not a floating tensor of one shape, whose meaning the message gives."""
    check_floating(argument, tensor)
    if tensor.shape != tuple(shape):
        expected = f"shape {tuple(shape)}, {meaning}"
        raise ShapeError(argument, expected=expected, received=f"shape {tuple(tensor.shape)}")


def check_mask(argument: str, mask: Tensor, shape: Sequence[int], *, meaning: str) -> None:
    """Refuse what is not bool, or does not broadcast to a shape, whose meaning the message gives."""
    check_dense(argument, mask)
    if mask.dtype != torch.bool:
        raise DtypeError(argument, expected="bool", received=_dtype_name(mask))
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        expected = f"a shape that broadcasts to {tuple(shape)}, {meaning}"
        raise ShapeError(argument, expected=expected, received=f"shape {tuple(mask.shape)}")


def check_out(argument: str, out: Tensor, like: Tensor, *others: Tensor | None) -> None:
    """Refuse a tensor that cannot take the output for an input: another kind of one, or one of the same memory."""
    check_dense(argument, out)
    if out.dtype != like.dtype or out.device != like.device:
        expected, received = f"{_dtype_name(like)} on {like.device}", f"{_dtype_name(out)} on {out.device}"
        raise DtypeError(argument, expected=expected, received=received)
    if out.shape != like.shape or out.stride() != torch.empty_like(like, device="meta").stride():
        expected = f"shape {tuple(like.shape)} in the memory format of the input"
        received = f"shape {tuple(out.shape)} with strides {out.stride()}"
        raise ShapeError(argument, expected=expected, received=received)
    operands = [like, *(other for other in others if other is not None)]
    if out.requires_grad or (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)):
        raise ParameterError(argument, expected="no gradients to be recorded", received="a tensor that requires them")
    place = out.untyped_storage().data_ptr()
    shared = [0 != place == operand.untyped_storage().data_ptr() for operand in operands]
    if any(shared):
        received = "that of the input" if shared[0] else "that of another argument"
        raise ParameterError(argument, expected="memory of its own", received=received)


def check_per_channel(argument: str, tensor: Tensor, *, num_features: int) -> None:
    """Refuse what is not one floating value per channel."""
    check_shape(argument, tensor, (num_features,), meaning="one value per channel of the input")


def check_eps(argument: str, eps: float, *, is_zero_allowed: bool) -> None:
    expected = "a finite number >= 0" if is_zero_allowed else "a finite number > 0 in training"
    _check_is_number(argument, eps, expected)
    if not math.isfinite(eps) or eps < 0 or (eps == 0 and not is_zero_allowed):
        raise ParameterError(argument, expected=expected, received=shown(eps))


def check_fraction(argument: str, fraction: float) -> None:
    expected = "a number from 0 to 1"
    _check_is_number(argument, fraction, expected)
    if not 0 <= fraction <= 1:
        raise ParameterError(argument, expected=expected, received=shown(fraction))


def check_variance(argument: str, variance: Tensor) -> None:
    """Refuse a variance that is negative or NaN in any channel."""
    # The least of values among which is NaN is NaN.
    if variance.numel() and not float(variance.amin()) >= 0:
        worst = float(variance[~(variance >= 0)][0])
        raise StatisticsError(argument, expected="values >= 0", received=f"{worst:g}")


def check_counts(argument: str, counts: Tensor) -> None:
    """Refuse numbers of values that are no whole numbers >= 0, or that float64 does not count up to."""
    is_refused = ~((counts >= 0) & (counts <= LARGEST_EXACT) & (counts == counts.floor()))
    if bool(is_refused.any()):
        worst = float(counts[is_refused][0])
        raise StatisticsError(argument, expected="whole numbers from 0 to 2^53", received=f"{worst:g}")


def check_batch_count(argument: str, count: Tensor) -> None:
    """Refuse what is not a single whole number >= 0; a whole number held in a floating tensor is taken."""
    check_dense(argument, count)
    if count.dtype == torch.bool or count.is_complex():
        raise DtypeError(argument, expected="an integer", received=_dtype_name(count))
    if count.numel() != 1:
        raise ShapeError(argument, expected="a single value", received=f"shape {tuple(count.shape)}")
    value = float(count)
    if not (0 <= value < _LARGEST_COUNT and value.is_integer()):
        raise StatisticsError(argument, expected="a whole number >= 0 and below 2^62", received=f"{value:g}")


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Refuse dual tensors of forward-mode derivatives, which kernels would take for constants."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        dual = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]  # torch has no types
        if dual.tangent is not None:
            message = "forward-mode derivatives (jvp): not of compiled kernels; take torch.autograd.grad, of any order"
            raise NotSupportedError(message)


def shown(value: object) -> str:
    """The value for a message, cut where it is long."""
    # Python refuses to print an integer of thousands of digits.
    is_long = isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARACTERS
    text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) and is_long else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _check_is_number(argument: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParameterError(argument, expected=expected, received=shown(value))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
