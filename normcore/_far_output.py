"""How compiled sweeps that read memory write an output: directly, or where it is large past the caches.

The processor reads memory that is overwritten first, line by line, and a large output drives out of its caches what is
there, itself too before somebody reads it. Lines that are written whole and are to go past the caches spare both. What
an output is computed in, vectors from any place on, are not such lines: it goes through room for a few of them.
"""

from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from normcore._compiled import inlined

# Outputs of more bytes than this do not stay in a cache until they are read.
_FAR = 2**24
_LINE, _PIECE_LINES = 64, 4
# Of fewer bytes between those that are read, it costs more than it spares.
_LEAST_RUN = 2**10
# Stretches of fewer bytes, unless of whole lines, have too much at their ends that is no line.
_LEAST_STRETCH = 2**11


@inlined
def way_to(out: Any, run: int, length: int) -> Any:
    """What an output is written to, the values of a line, and of the line where it starts those before it.

    Where it is written directly, lines are of no values. A run are the values after which a sweep turns to reading, of
    one or more stretches of a length that it writes at once.
    """
    is_long = length * out.itemsize >= _LEAST_STRETCH or length * out.itemsize % _LINE == 0
    is_far = out.size * out.itemsize > _FAR and run * out.itemsize >= _LEAST_RUN and is_long
    lanes = _LINE // out.itemsize
    room = np.empty(_PIECE_LINES * lanes if is_far else 0, out.dtype)
    start = np.uintp(out.ctypes.data) % np.uintp(_LINE) // np.uintp(out.itemsize)
    return room if is_far else out, np.uintp(lanes if is_far else 0), start


@inlined
def piece(way: Any, at: Any, end: Any) -> Any:
    """Values of the next piece of an output, and where it is written in the way."""
    _, lanes, start = way
    if lanes == np.uintp(0):
        return end - at, at
    beyond = (start + at) % lanes
    most = lanes - beyond if beyond else lanes * np.uintp(_PIECE_LINES)
    return min(most, end - at), np.uintp(0)


@inlined
def send(way: Any, out: Any, at: Any, length: Any) -> None:
    """Bring a piece that was written to its place, whole lines past the caches."""
    room, lanes, start = way
    if lanes == np.uintp(0):
        return
    index = np.uintp(0)
    if (start + at) % lanes == np.uintp(0):
        while index + lanes <= length:
            _send_line(room, index, out, at + index)
            index += lanes
    while index < length:
        out[at + index] = room[index]
        index += np.uintp(1)


@inlined
def arrive(way: Any) -> None:
    """Wait for what was sent, before other threads are told that it is there."""
    if way[1] != np.uintp(0):
        _wait_for_lines()


def _sent_line(_context: Any, room: Any, index: Any, out: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = (context.make_array(signature.args[own])(context, builder, arguments[own]).data for own in (0, 2))
        source, target = (builder.gep(data, [arguments[own]]) for data, own in zip(arrays, (1, 3), strict=True))
        line = ir.VectorType(ir.IntType(64), _LINE // 8).as_pointer()
        value = builder.load(builder.bitcast(source, line), align=1)
        stored = builder.store(value, builder.bitcast(target, line), align=_LINE)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(room, index, out, at), generate


def _sent_lines(_context: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# Their type says that they make a class, which they do not.
_send_line, _wait_for_lines = cast("Any", intrinsic(_sent_line)), cast("Any", intrinsic(_sent_lines))
