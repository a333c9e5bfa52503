"""Pickles as data: the few opcodes that torch.save writes for a state_dict, and nothing that runs code.

A pickle is a program for a stack machine. Of its instructions, this machine knows those that build plain containers,
numbers and texts. GLOBAL only looks a name up in a closed table, REDUCE only calls what that table holds, and BUILD
changes nothing. Everything else is refused.
"""

import struct
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NoReturn

from normcore.errors import CheckpointError

Reduce = Callable[[tuple[Any, ...]], object]

_KEYS = (str, int, float, bool, bytes, type(None))
_LONGEST_NAME = 1024
_CONTAINERS = frozenset((b"}", b"]", b"t", b"l", b"d", b"R", b"\x85", b"\x86", b"\x87"))
_TOO_DAMAGED = "the pickle of the checkpoint is damaged"


class PickleMachine:
    """Runs one pickle.

    Args:
        content: the pickle.
        max_containers: how many dictionaries, lists and tuples it may make; one byte of a pickle can make one.
        globals: by `module name`, what REDUCE may call, or an object that stands for itself.
        refuse: called with the `module name` of any other global; raises.
        persistent: what BINPERSID makes of its argument.
    """

    def __init__(
        self,
        content: bytes,
        *,
        max_containers: int,
        globals: Mapping[str, object],
        refuse: Callable[[str], NoReturn],
        persistent: Callable[[object], object],
    ) -> None:
        self._content = content
        self._position = 0
        self._containers_left = max_containers
        self._globals = globals
        self._refuse = refuse
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """The object that the pickle describes. Raises CheckpointError."""
        try:
            while True:
                opcode = self._take(1)
                if opcode == b".":
                    return self._stack.pop()
                step = _OPCODES.get(opcode)
                if step is None:
                    raise CheckpointError(
                        f"the pickle of the checkpoint uses the instruction {opcode!r}, which a saved state_dict "
                        "does not need; save model.state_dict() again, or convert it to safetensors"
                    )
                if opcode in _CONTAINERS:
                    self._containers_left -= 1
                if self._containers_left < 0:
                    raise CheckpointError("the pickle of the checkpoint holds more containers than a state_dict needs")
                step(self)
        except CheckpointError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, struct.error):  # of bytes that are no such pickle
            raise CheckpointError(_TOO_DAMAGED) from None

    def _take(self, size: int) -> bytes:
        content = self._content[self._position : self._position + size]
        if len(content) != size:
            raise CheckpointError(f"{_TOO_DAMAGED}: it ends early")
        self._position += size
        return content

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> str:
        end = self._content.find(b"\n", self._position, self._position + _LONGEST_NAME)
        if end < 0:
            raise CheckpointError(_TOO_DAMAGED)
        line = self._content[self._position : end].decode()
        self._position = end + 1
        return line

    def _pop_marked(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _proto(self) -> None:
        version = self._number(1)
        if not 2 <= version <= 5:
            raise CheckpointError(f"the pickle of the checkpoint has protocol {version}; 2 to 5 are read")

    def _global(self, module: str, name: str) -> None:
        path = f"{module} {name}"
        if path not in self._globals:
            self._refuse(path)
        self._stack.append(self._globals[path])

    def _global_line(self) -> None:
        module = self._line()
        self._global(module, self._line())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise CheckpointError(_TOO_DAMAGED)
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple or not callable(function):
            raise CheckpointError(_TOO_DAMAGED)
        self._stack.append(function(arguments))

    def _set_items(self) -> None:
        items = self._pop_marked()
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise CheckpointError(_TOO_DAMAGED)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _set_item(self) -> None:
        self._marks.append(len(self._stack) - 2)
        self._set_items()

    def _extend(self) -> None:
        items = self._pop_marked()
        target = self._stack[-1]
        if type(target) is not list:
            raise CheckpointError(_TOO_DAMAGED)
        target.extend(items)

    def _append(self) -> None:
        self._marks.append(len(self._stack) - 1)
        self._extend()

    def _tuple_of(self, size: int) -> None:
        if len(self._stack) < size:
            raise CheckpointError(_TOO_DAMAGED)
        start = len(self._stack) - size
        self._stack[start:] = [tuple(self._stack[start:])]

    def _dict_of_marked(self) -> None:
        items = self._pop_marked()
        self._stack.append({})
        self._marks.append(len(self._stack))
        self._stack.extend(items)
        self._set_items()

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _push(self, value: object) -> None:
        self._stack.append(value)


def _key(key: object) -> Hashable:
    """Keys are numbers and texts: hashing a nested tuple can take forever."""
    if type(key) not in _KEYS:
        raise CheckpointError(f"the checkpoint has a dictionary with a key of type {type(key).__name__}")
    return key


Step = Callable[[PickleMachine], None]


def _bytes_steps() -> dict[bytes, Step]:
    """Texts and bytes, by the width of their length."""
    steps: dict[bytes, Step] = {}
    for opcode, width in ((b"X", 4), (b"\x8c", 1), (b"\x8d", 8)):
        steps[opcode] = lambda machine, width=width: machine._push(  # type: ignore[misc]  # a default binds the loop's value
            machine._take(machine._number(width)).decode()
        )
    for opcode, width in ((b"C", 1), (b"B", 4), (b"\x8e", 8)):
        steps[opcode] = lambda machine, width=width: machine._push(machine._take(machine._number(width)))  # type: ignore[misc]  # as above
    for opcode, width in ((b"U", 1), (b"T", 4)):
        steps[opcode] = lambda machine, width=width: machine._push(  # type: ignore[misc]  # as above
            machine._take(machine._number(width)).decode("latin-1")
        )
    return steps


_OPCODES: dict[bytes, Step] = _bytes_steps() | {
    b"\x80": PickleMachine._proto,
    b"\x95": lambda machine: machine._take(8) and None,
    b"(": lambda machine: machine._marks.append(len(machine._stack)),
    b"0": lambda machine: machine._stack.pop() and None,
    b"1": lambda machine: machine._pop_marked() and None,
    b"N": lambda machine: machine._push(None),
    b"\x88": lambda machine: machine._push(True),
    b"\x89": lambda machine: machine._push(False),
    b"K": lambda machine: machine._push(machine._number(1)),
    b"M": lambda machine: machine._push(machine._number(2)),
    b"J": lambda machine: machine._push(machine._number(4, signed=True)),
    b"\x8a": lambda machine: machine._push(machine._number(machine._number(1), signed=True)),
    b"G": lambda machine: machine._push(struct.unpack(">d", machine._take(8))[0]),
    b"}": lambda machine: machine._push({}),
    b"]": lambda machine: machine._push([]),
    b")": lambda machine: machine._push(()),
    b"t": lambda machine: machine._push(tuple(machine._pop_marked())),
    b"l": lambda machine: machine._push(machine._pop_marked()),
    b"d": PickleMachine._dict_of_marked,
    b"\x85": lambda machine: machine._tuple_of(1),
    b"\x86": lambda machine: machine._tuple_of(2),
    b"\x87": lambda machine: machine._tuple_of(3),
    b"q": lambda machine: machine._put(machine._number(1)),
    b"r": lambda machine: machine._put(machine._number(4)),
    b"\x94": lambda machine: machine._put(len(machine._memo)),
    b"h": lambda machine: machine._push(machine._memo[machine._number(1)]),
    b"j": lambda machine: machine._push(machine._memo[machine._number(4)]),
    b"c": PickleMachine._global_line,
    b"\x93": PickleMachine._stack_global,
    b"R": PickleMachine._reduce,
    b"b": lambda machine: machine._stack.pop() and None,
    b"s": PickleMachine._set_item,
    b"u": PickleMachine._set_items,
    b"a": PickleMachine._append,
    b"e": PickleMachine._extend,
    b"Q": lambda machine: machine._push(machine._persistent(machine._stack.pop())),
}


__all__ = ["PickleMachine", "Reduce"]
