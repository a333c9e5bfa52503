"""The process that imports the heavy libraries once and forks a child for every operation on an uploaded graph.

Fresh interpreters would pay seconds of imports per operation; a child forked from here starts in milliseconds and
holds no memory, files or secrets of the server, because this process never had them. It stays single-threaded: only
then is a fork of it sound.

server ── control ──> zygote ── fork ──> keeper ── fork ──> child
   └─ lease: closed by the server, the keeper kills the child; the child ended, the keeper writes its exit code.
   └─ conversation with the child: one line of JSON with the request, then lines with progress and one with the reply.

The replies are data (JSON), never pickles: the child may have been taken over by what it read.
"""

import errno
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from normcore.errors import NormcoreError
from service.engine import limits
from service.engine.limits import Limits

Report = Callable[[str, int, int], None]
Operation = Callable[[Mapping[str, Any], Report], Mapping[str, Any]]
READY = b"r"
FORK = b"f"
OUT_OF_MEMORY = "MemoryError"
OUT_OF_DISK = "StorageFullError"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: list[str]) -> None:
    control_fd, module, memory_bytes, cpu_s = arguments
    limits.isolate()
    operations: Mapping[str, Operation] = importlib.import_module(module).OPERATIONS
    control = socket.socket(fileno=int(control_fd))
    # nothing here is worth the second that an interpreter takes to leave these libraries in order
    _exit_after(serve, control, operations, Limits(int(memory_bytes), int(cpu_s)))


def serve(control: socket.socket, operations: Mapping[str, Operation], child_limits: Limits) -> None:
    """Fork for every request until the server closes its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the keepers
    control.sendall(READY)
    while True:
        message, fds, _, _ = socket.recv_fds(control, len(FORK), 2)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _exit_after(_keep, *fds, operations, child_limits)
        for fd in fds:
            os.close(fd)


def _exit_after(step: Callable[..., None], *arguments: Any) -> None:
    """Run the last step of a process, at once the last of it: a fork must never return into its parent's code."""
    status = 1
    try:
        step(*arguments)
        status = 0
    finally:
        os._exit(status)


def _keep(conversation_fd: int, lease_fd: int, operations: Mapping[str, Operation], child_limits: Limits) -> None:
    """Watch one child: kill it when the lease ends, tell its exit code when it ended."""
    limits.die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    life, life_of_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(life)
        os.close(lease_fd)
        _exit_after(_work, conversation_fd, operations, child_limits)
    os.close(life_of_child)
    os.close(conversation_fd)
    ended, _, _ = select.select([life, lease_fd], [], [])
    if life not in ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):
        os.write(lease_fd, str(os.waitstatus_to_exitcode(status)).encode())


def _work(conversation_fd: int, operations: Mapping[str, Operation], child_limits: Limits) -> None:
    limits.die_with_parent()
    limits.silence()
    child_limits.apply()
    with socket.socket(fileno=conversation_fd) as connection, connection.makefile("rwb") as conversation:

        def say(line: bytes) -> None:
            conversation.write(line + b"\n")
            conversation.flush()

        request = json.loads(conversation.readline())
        say(reply(operations[request["operation"]], request["arguments"], say))


def reply(operation: Operation, arguments: Mapping[str, Any], say: Callable[[bytes], None]) -> bytes:
    """`{"result": ...}`, or `{"error": ...}` with the class names to choose from, the message and scalar attributes."""
    try:
        return _encode("result", operation(arguments, lambda *progress: say(_encode("progress", progress))))
    except NormcoreError as error:
        classes = [cls.__name__ for cls in type(error).__mro__]
        scalars = {name: value for name, value in vars(error).items() if isinstance(value, str | int | float)}
        return _encode("error", {"classes": classes, "message": str(error), "attributes": scalars})
    except MemoryError:
        return _encode("error", {"classes": [OUT_OF_MEMORY]})
    except Exception as error:  # noqa: BLE001 - the server raises and logs it
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return _encode("error", {"classes": [OUT_OF_DISK]})
        return _encode("error", {"classes": [], "message": traceback.format_exc()})


def _encode(kind: str, content: object) -> bytes:
    return json.dumps({kind: content}).encode()


if __name__ == "__main__":
    main(sys.argv[1:])
