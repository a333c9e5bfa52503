"""Sandbox: everything that touches an uploaded graph before it is served runs in a child process with limits.

How the children come to be is told in zygote.py; what they do, in operations.py.
"""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, NoReturn

from normcore.errors import (
    ArgumentError,
    CheckpointError,
    DeadlineError,
    DtypeError,
    FoldError,
    NormcoreError,
    NotSupportedError,
    ParameterError,
    ShapeError,
    StatisticsError,
)
from normcore.execution import ExecutionError
from service.engine.sandbox_process import SandboxProcess
from service.engine.zygote import OUT_OF_DISK, OUT_OF_MEMORY
from service.errors import OverloadedError, ShuttingDownError, StorageFullError

OPERATIONS = "service.engine.operations"
Progress = Callable[[str, int, int], None]

_MAX_REPLY_BYTES = 64 * 1024 * 1024
_LARGE_REPLY_BYTES = 64 * 1024
_MAX_STATUS_BYTES = 16
_KILL_S = 10.0
_ERRORS: Mapping[str, type[NormcoreError]] = {
    error.__name__: error
    for error in (
        ArgumentError,
        CheckpointError,
        DeadlineError,
        DtypeError,
        ExecutionError,
        FoldError,
        NormcoreError,
        NotSupportedError,
        ParameterError,
        ShapeError,
        StatisticsError,
    )
}
_has_place: ContextVar[bool] = ContextVar("_has_place", default=False)
_ATTRIBUTES = ("argument", "expected", "received", "deadline_s")


class Sandbox:
    """Runs operations on uploaded graphs, `slots` at once while `queue` more may wait."""

    def __init__(
        self, *, memory_bytes: int, deadline_s: float, slots: int, queue: int, operations: str = OPERATIONS
    ) -> None:
        """`operations` names the module whose table `OPERATIONS` the children offer."""
        self._memory_bytes = memory_bytes
        self._deadline_s = deadline_s
        self._capacity = slots + queue
        self._slots = asyncio.Semaphore(slots)
        self._process = SandboxProcess(operations, memory_bytes=memory_bytes, deadline_s=deadline_s)
        self._admitted = 0
        self._is_closed = False

    async def start(self) -> None:
        """Start the process that children are forked from, and wait for its imports (seconds)."""
        await self._process.ensure()

    async def run(
        self, operation: str, arguments: Mapping[str, Any], *, progress: Progress | None = None
    ) -> dict[str, Any]:
        """The operation's result. A cancelled caller's child is killed.

        Raises:
            OverloadedError: too many operations wait.
            CheckpointError: the file, or what it made the child do, broke a limit.
            NormcoreError: whatever else the operation refuses.
            StorageFullError: there was no room for the file it wrote.
            ShuttingDownError: the sandbox is closed.
            RuntimeError: a defect of ours; the text is for the log.
        """
        async with self._slot():
            await self._process.ensure()
            try:
                async with asyncio.timeout(self._deadline_s), self._child() as (reader, writer, lease):
                    writer.write(json.dumps({"operation": operation, "arguments": arguments}).encode() + b"\n")
                    async for message in _messages(reader):
                        if "result" in message:
                            result: dict[str, Any] = message["result"]
                            return result
                        if "error" in message:
                            self._raise(message["error"])
                        if progress is not None:
                            step, done, total = message["progress"]
                            progress(step, done, total)
                    self._raise_exit(await _exit_status(lease))
            except TimeoutError:
                raise CheckpointError(
                    f"{operation} took longer than {self._deadline_s:g} s (NORMSERVE_SANDBOX_DEADLINE_S)"
                ) from None

    async def close(self) -> None:
        """Refuse what waits and kill what runs."""
        self._is_closed = True
        await self._process.close()

    def reserve(self) -> "Place":
        """Admit now what will run later. Raises OverloadedError if too many operations wait."""
        return Place(self)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        with nullcontext() if _has_place.get() else self.reserve():
            async with self._slots:
                self._refuse_if_closed()
                yield

    def _admit(self) -> None:
        if self._admitted >= self._capacity:
            raise OverloadedError(
                f"{self._admitted} operations on checkpoints run or wait already "
                "(NORMSERVE_SANDBOX_SLOTS, NORMSERVE_SANDBOX_QUEUE); try again"
            )
        self._admitted += 1

    def _leave(self) -> None:
        self._admitted -= 1

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise ShuttingDownError("the service is shutting down")

    @asynccontextmanager
    async def _child(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, socket.socket]]:
        """Conversation with a new child and its lease; the child is dead when the block is left."""
        conversation, lease = self._process.fork()
        with lease:
            async with _streams(conversation) as (reader, writer):
                try:
                    yield reader, writer, lease
                finally:
                    lease.shutdown(socket.SHUT_WR)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_KILL_S):
                            await _exit_status(lease)

    def _raise(self, error: Mapping[str, Any]) -> NoReturn:
        classes = error["classes"]
        if OUT_OF_MEMORY in classes:
            raise self._memory_error("needs")
        if OUT_OF_DISK in classes:
            raise StorageFullError("no room for the checkpoint that the operation wrote")
        for name in classes:
            if name in _ERRORS:
                raise _rebuilt(_ERRORS[name], error)
        raise RuntimeError(f"the operation failed in its child process:\n{error['message']}")

    def _raise_exit(self, status: bytes) -> NoReturn:
        self._refuse_if_closed()
        code = int(status or 0)
        if code == -signal.SIGXCPU:
            raise CheckpointError(
                f"the checkpoint takes more than {self._process.cpu_s} s of CPU time (NORMSERVE_SANDBOX_DEADLINE_S)"
            )
        if code == -signal.SIGKILL:
            raise self._memory_error("was stopped by the system; it probably needs")
        if code < 0:
            raise self._memory_error(f"crashed its reader ({signal.Signals(-code).name}); it may need")
        raise RuntimeError(f"the child process ended with status {status.decode() or 'unknown'} and without a reply")

    def _memory_error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {what} more than {self._memory_bytes} bytes of memory (NORMSERVE_SANDBOX_MEMORY_BYTES)"
        )


class Place:
    """A place among the operations that run or wait, for those that run one after the other within its context."""

    def __init__(self, sandbox: Sandbox) -> None:
        sandbox._admit()
        self._sandbox = sandbox

    def __enter__(self) -> None:
        self._token = _has_place.set(True)

    def __exit__(self, *_: object) -> None:
        _has_place.reset(self._token)
        self._sandbox._leave()


@asynccontextmanager
async def _streams(connection: socket.socket) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    try:
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=_MAX_REPLY_BYTES)
    except BaseException:
        connection.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.close()


async def _exit_status(lease: socket.socket) -> bytes:
    """What the keeper tells of an ended child; nothing if it was told before, or if the keeper was killed."""
    return await asyncio.get_running_loop().sock_recv(lease, _MAX_STATUS_BYTES)


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Lines of JSON until the child ends; a line that it did not finish is none."""
    while True:
        try:
            line = await reader.readline()
        except ConnectionError:  # it ended before it read its request
            return
        except ValueError:
            raise CheckpointError(f"what there is to say of the checkpoint is over {_MAX_REPLY_BYTES} bytes") from None
        if not line.endswith(b"\n"):
            return
        yield json.loads(line) if len(line) < _LARGE_REPLY_BYTES else await asyncio.to_thread(json.loads, line)


def _rebuilt(error_class: type[NormcoreError], error: Mapping[str, Any]) -> NormcoreError:
    rebuilt = error_class.__new__(error_class, error["message"])
    for name in _ATTRIBUTES:
        if name in error["attributes"]:
            setattr(rebuilt, name, error["attributes"][name])
    return rebuilt
