"""The server's end of the sandbox: one zygote process, started when needed, from which children are forked."""

import asyncio
import math
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import IO

from service.engine.zygote import FORK, READY
from service.errors import ShuttingDownError

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "NUMBA_CACHE_DIR")
# What starts threads at its import: they would be lost in every fork, with the locks they hold. onnxruntime's is the
# sender of its telemetry, which a child has no network for anyway.
_SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
_START_S = 120.0
_STOP_S = 5.0


class SandboxProcess:
    """A zygote that is started again if it is gone."""

    def __init__(self, operations: str, *, memory_bytes: int, deadline_s: float) -> None:
        self.cpu_s = math.ceil(deadline_s * len(os.sched_getaffinity(0)))  # the wall clock is the first to stop a child
        self._operations = operations
        self._memory_bytes = memory_bytes
        self._starting = asyncio.Lock()
        self._running: _Running | None = None
        self._is_closed = False

    async def ensure(self) -> None:
        """Return when children can be forked."""
        async with self._starting:
            if self._is_closed:
                raise ShuttingDownError("the service is shutting down")
            if self._running is not None and not self._running.is_alive():
                self._running.close()
                self._running = None
            if self._running is None:
                arguments = [self._operations, str(self._memory_bytes), str(self.cpu_s)]
                self._running = await asyncio.to_thread(_Running, arguments)

    def fork(self) -> tuple[socket.socket, socket.socket]:
        """A new child: the conversation with it, and its lease. Call `ensure` before."""
        assert self._running is not None
        return self._running.fork()

    async def close(self) -> None:
        """End the process; its children end with it."""
        self._is_closed = True
        async with self._starting:
            if self._running is not None:
                await asyncio.to_thread(self._running.close)
                self._running = None


class _Running:
    """One process and the socket to it. Its standard error goes to a file, which is read if it fails to start."""

    def __init__(self, arguments: list[str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as log:
            self._process = _spawn([str(theirs.fileno()), *arguments], theirs.fileno(), log)
            theirs.close()
            if not self._is_ready():
                self.close()
                log.seek(0)
                raise RuntimeError(f"the sandbox process does not start:\n{log.read().decode(errors='replace')}")

    def _is_ready(self) -> bool:
        self._control.settimeout(_START_S)
        try:
            return self._control.recv(len(READY)) == READY
        except TimeoutError:
            return False

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> tuple[socket.socket, socket.socket]:
        conversation, conversation_of_child = socket.socketpair()
        lease, lease_of_keeper = socket.socketpair()
        fds = [conversation_of_child.fileno(), lease_of_keeper.fileno()]
        # a process that died this moment took nothing: the conversation with it ends at once
        with conversation_of_child, lease_of_keeper, suppress(BrokenPipeError):
            socket.send_fds(self._control, [FORK], fds)
        lease.setblocking(False)
        return conversation, lease

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _spawn(arguments: list[str], inherited_fd: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.curdir for path in sys.path)
    environment |= _SINGLE_THREADED
    return subprocess.Popen(
        [sys.executable, "-m", "service.engine.zygote", *arguments],
        env=environment,
        pass_fds=[inherited_fd],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,  # an interrupt from the terminal is the server's to handle
    )
