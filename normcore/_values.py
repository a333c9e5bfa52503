"""How compiled kernels see tensors, and read and write their values.

Kernels see a tensor as a flat array in memory order, which `_compiled.flat` makes. That costs a microsecond: those that
small tensors go through take the address of the first value instead, of which `values_at` makes the array. Half
precision has no type there that numba knows, so its bits stand for it: float16 as int16, bfloat16 as uint16. `load`
reads a value as what sums are made of, float32 for half precision and else float64; `as_computed` brings a parameter
there. `read` reads it as what outputs are computed in, float32 for all but float64, which halves their cost. `store`
rounds a result to nearest even. All of them turn into a few vector instructions within a loop.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, overload

from normcore._compiled import compiled, inlined

# Typed as a class, of which it makes none.
_intrinsic: Any = intrinsic
# Without such instructions a conversion would call a function that is not there.
_HAS_HALF = bool(binding.get_host_cpu_features().get("f16c"))


def values_at(kind: Any, place: Any, count: Any) -> Any:
    """The values of a kind at an address, as an array; what is an array or nothing is itself. In compiled functions."""
    raise NotImplementedError


def parameters_at(kind: Any, place: Any, count: Any) -> Any:
    """The same of weight or bias, which are of the datatype that `read` gives for such values."""
    raise NotImplementedError


@inlined
def three_at(kind: Any, x: Any, grad: Any, out: Any, count: int) -> Any:
    """What a backward reads and writes: values, gradient of the output and that of the input."""
    return values_at(kind, x, count), values_at(kind, grad, count), values_at(kind, out, count)


def load(array: Any, index: Any) -> Any:
    """The element as float32 in half precision, else as float64; only in compiled functions."""
    raise NotImplementedError


def as_computed(array: Any, value: Any) -> Any:
    """A number in the datatype that `load` gives for the array; only in compiled functions."""
    raise NotImplementedError


def read(array: Any, index: Any) -> Any:
    """The element as float64 in float64, else as float32; only in compiled functions."""
    raise NotImplementedError


def as_read(array: Any, value: Any) -> Any:
    """A number in the datatype that `read` gives for the array; only in compiled functions."""
    raise NotImplementedError


def store(array: Any, index: Any, value: Any) -> None:
    """Round a number into an array; only in compiled functions."""
    raise NotImplementedError


def _typed_pointer(_context: Any, address: Any, kind: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    pointer: Any = types.CPointer
    return pointer(kind)(address, kind), generate


_pointer, _array_of = _intrinsic(_typed_pointer), numba.carray  # type: ignore[attr-defined]  # numba has no types


@overload(values_at, strict=False)
def _values_at(kind: Any, place: Any, count: Any) -> Callable[[Any, Any, Any], Any]:
    if isinstance(place, types.Integer):
        return lambda kind, place, count: _array_of(_pointer(place, kind), (count,))
    return lambda kind, place, count: place


@overload(parameters_at, strict=False)
def _parameters_at(kind: Any, place: Any, count: Any) -> Callable[[Any, Any, Any], Any]:
    if kind == types.float64:
        return lambda kind, place, count: values_at(kind, place, count)
    return lambda kind, place, count: values_at(np.float32(0), place, count)


@overload(load, strict=False)
def _load(array: Any, index: Any) -> Callable[[Any, Any], Any]:
    if array.dtype == types.int16:
        from_half = _half_to_float if _HAS_HALF else _from_half
        return lambda array, index: from_half(array[index])
    if array.dtype == types.uint16:
        return lambda array, index: _float_of(np.uint32(np.uint32(array[index]) << 16))
    return lambda array, index: np.float64(array[index])


@overload(read, strict=False)
def _read(array: Any, index: Any) -> Callable[[Any, Any], Any]:
    if array.dtype in (types.int16, types.uint16):
        return lambda array, index: load(array, index)
    return lambda array, index: array[index]


@overload(as_read, strict=False)
def _as_read(array: Any, value: Any) -> Callable[[Any, Any], Any]:
    if array.dtype == types.float64:
        return lambda array, value: np.float64(value)
    return lambda array, value: np.float32(value)


@overload(as_computed, strict=False)
def _as_computed(array: Any, value: Any) -> Callable[[Any, Any], Any]:
    if array.dtype in (types.int16, types.uint16):
        return lambda array, value: np.float32(value)
    return lambda array, value: np.float64(value)


@overload(store, strict=False)
def _store(array: Any, index: Any, value: Any) -> Callable[[Any, Any, Any], None]:
    to_half = _float_to_half if _HAS_HALF else _to_half

    def store_half(array: Any, index: Any, value: Any) -> None:
        array[index] = to_half(np.float32(value))

    def store_brain(array: Any, index: Any, value: Any) -> None:
        array[index] = _to_brain(np.float32(value))

    def store_wide(array: Any, index: Any, value: Any) -> None:
        array[index] = value

    return {types.int16: store_half, types.uint16: store_brain}.get(array.dtype, store_wide)


def _instruction(source: Any, to: Any, generate: Callable[[Any, Any], Any]) -> Any:
    """A function of one value that is what `generate` gives in the compiler's own language."""

    def typed(_context: Any, _value: Any) -> Any:
        return to(source), lambda _context, builder, _signature, arguments: generate(builder, arguments[0])

    return _intrinsic(typed)


def _fetch(is_to_store: bool) -> Any:
    """A function of an array and an index that tells the processor to have a value, or room for it, in its cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), _BYTE.as_pointer())
        typed = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _WORD, _WORD, _WORD])
        call = builder.module.declare_intrinsic("llvm.prefetch.p0", (), typed)
        builder.call(call, [place, _WORD(int(is_to_store)), _WORD(_SECOND_LEVEL), _WORD(1)])
        return context.get_dummy_value()

    def typed(_context: Any, array: Any, index: Any) -> Any:
        return types.none(array, index), generate

    return _intrinsic(typed)


_SECOND_LEVEL = 2  # of the caches
_LINE = 64  # bytes
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_BYTE, _SHORT, _WORD, _LONG = (ir.IntType(width) for width in (8, 16, 32, 64))
# An array among the arguments of a step costs as much as a number of some digits, which is what these two are for.
byte_at = _instruction(
    types.int64, types.uint8, lambda builder, address: builder.load(builder.inttoptr(address, _BYTE.as_pointer()))
)
fetch, fetch_to_store = _fetch(is_to_store=False), _fetch(is_to_store=True)
bits_of = _instruction(types.float64, types.uint64, lambda builder, value: builder.bitcast(value, _LONG))
_bits_of = _instruction(types.float32, types.uint32, lambda builder, value: builder.bitcast(value, _WORD))
_float_of = _instruction(types.uint32, types.float32, lambda builder, value: builder.bitcast(value, _FLOAT))
_half_to_float = _instruction(
    types.int16, types.float32, lambda builder, value: builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
)
_float_to_half = _instruction(
    types.float32, types.int16, lambda builder, value: builder.bitcast(builder.fptrunc(value, _HALF), _SHORT)
)


@inlined
def fetch_lines(x: Any, grad: Any, out: Any, start: Any, count: Any) -> None:
    """Fetch so many values of those that are given, line by line; `out` to be written."""
    for index in range(start, start + count, np.uintp(_LINE // x.itemsize)):
        fetch(x, index)
        if grad is not None:
            fetch(grad, index)
        if out is not None:
            fetch_to_store(out, index)


@inlined
def fetch_to_write(out: Any, start: Any, count: Any) -> None:
    """Fetch the lines of so many values that are written soon.

    Stores are done in order: until such a line has come from memory, those to what is in the cache wait behind it.
    """
    for index in range(start, start + count, np.uintp(_LINE // out.itemsize)):
        fetch_to_store(out, index)


# numba makes 64 bits of every integer operation; the casts back are what lets the compiler do it in 32.
@compiled
def _from_half(half: Any) -> Any:
    """Float32 of a float16, where the processor has no such instruction; the exponent's bias is multiplied away."""
    magnitude = np.uint32(half & 0x7FFF)
    shifted = np.uint32(magnitude << 13)
    wide = _bits_of(_float_of(shifted) * np.float32(2.0**112))
    if magnitude >= 0x7C00:
        wide = np.uint32(shifted | 0x7F800000)
    return _float_of(np.uint32(wide | np.uint32((half & 0x8000) << 16)))


@compiled
def _to_half(value: Any) -> Any:
    """The float16 nearest to a float32."""
    bits = _bits_of(value)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    odd = np.uint32(magnitude >> 13) & 1
    half = np.uint32(np.uint32(magnitude - 0x38000000 + 0xFFF + odd) >> 13)
    # Subnormal: units of 2^-24, which is what a sum with 0.5 is rounded to.
    least = np.uint32(_bits_of(_float_of(magnitude) + np.float32(0.5)) - 0x3F000000)
    half = least if magnitude < 0x38800000 else half
    half = np.uint32(0x7C00) if magnitude >= 0x47800000 else half
    half = np.uint32(0x7E00) if magnitude > 0x7F800000 else half
    return np.int16(half | np.uint32(np.uint32(bits >> 16) & 0x8000))


@compiled
def _to_brain(value: Any) -> Any:
    """The bfloat16 nearest to a float32."""
    bits = _bits_of(value)
    rounded = np.uint32(np.uint32(bits + 0x7FFF + (np.uint32(bits >> 16) & 1)) >> 16)
    return np.uint16(0x7FC0) if np.uint32(bits & 0x7FFFFFFF) > 0x7F800000 else np.uint16(rounded)
