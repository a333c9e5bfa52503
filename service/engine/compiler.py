"""Kernels are compiled by processes of their own, as long as not all of them are kept on the disk.

Compiling in this process would hold up the interpreter, and with it every request. One process compiles all kernels, at
the lowest priority, and ends; another compiles, at once, what a call waits for. Calls then load what they have kept.
"""

import asyncio
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from normcore.compilation import compile_kernel, compiled_elsewhere, has_folder, is_all_kept, keep_all
from service.engine import limits
from service.engine.batch import Excuse
from service.engine.limits import Limits
from service.errors import ShuttingDownError
from service.settings import Settings

log = logging.getLogger(__name__)

_DONE = b"."
_FILL, _HELP = "fill", "help"
_LOWEST = 19
_CPU_S = 3600
_LOG_BYTES = 2000


class Compiler:
    """The processes, and what is known of their work. It belongs to the event loop that starts it."""

    def __init__(self, settings: Settings) -> None:
        self._patience_s = settings.compile_s
        self._memory_bytes = settings.sandbox_memory_bytes
        self.excuse = Excuse(self._waited_until_now_s, most_s=settings.compile_s, from_s=settings.infer_deadline_s)
        self._owner = os.getpid()
        self._asking = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._filler: subprocess.Popen[bytes] | None = None
        self._waited: tuple[float, float | None] = 0.0, None
        self._is_closed = False
        self._stack = ExitStack()
        self.has_all = False

    async def start(self) -> None:
        """Have what calls need compiled from now on, if not all of it is kept."""
        self.has_all = await asyncio.to_thread(is_all_kept)
        if self.has_all or not self._patience_s:
            return
        if not has_folder():
            log.warning("no directory for compiled kernels can be written (NUMBA_CACHE_DIR): every start compiles them")
            return
        self._helper = self._start_process(_HELP)
        self._stack.enter_context(compiled_elsewhere(self.compile))

    async def fill(self, *, is_urgent: bool) -> None:
        """Compile all that is not kept, and return when that is done; where it `is_urgent`, nothing has priority."""
        if self._helper is None:
            return
        log.info("kernels are compiled for this processor; until that is done, calls may wait for theirs")
        self._filler = self._start_process(_FILL)
        if not is_urgent:
            os.setpriority(os.PRIO_PROCESS, self._filler.pid, _LOWEST)
        said, _ = await asyncio.to_thread(self._filler.communicate)
        self.has_all = self._filler.returncode == 0
        if self.has_all:
            log.info("all kernels are compiled and kept")
            await asyncio.to_thread(self._end_helper)
        elif not self._is_closed:
            end = said[-_LOG_BYTES:].decode(errors="replace")
            told = {"status": self._filler.returncode, "said": end}
            log.warning("not all kernels could be compiled ahead of calls", extra=told)

    async def close(self) -> None:
        """End the processes; what they have compiled so far is kept."""
        self._is_closed = True
        self._stack.close()
        for process in (self._filler, self._helper):
            if process is not None:
                process.kill()
                await asyncio.to_thread(process.wait)

    def compile(self, module: str, kernel: str, types: Any) -> bool:
        """Have the kernel compiled, and wait for it; false where this process is to do it. From any thread."""
        if os.getpid() != self._owner:
            return False
        with self._asking:
            if self._helper is None:
                return False
            with self._counted(), self._filler_stopped():
                problem = self._ask(self._helper, pickle.dumps((module, kernel, types)))
        if problem and self._is_closed:
            raise ShuttingDownError("the service is shutting down")
        if problem:
            log.warning("the process that compiles kernels %s: calls compile them here", problem)
            self._end_helper()
        return not problem

    def _start_process(self, work: str) -> subprocess.Popen[bytes]:
        # By the thread of the event loop: a process is killed when the thread that started it ends.
        return subprocess.Popen(
            [sys.executable, "-m", __name__, work, str(self._memory_bytes), str(self._owner)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )

    def _ask(self, helper: subprocess.Popen[bytes], question: bytes) -> str:
        """What is wrong with the helper, if anything."""
        assert helper.stdin is not None
        assert helper.stdout is not None
        try:
            helper.stdin.write(question)
            answer = select.poll()
            answer.register(helper.stdout, select.POLLIN)
            if not answer.poll(self._patience_s * 1000):
                return f"took longer than {self._patience_s:g} s (NORMSERVE_COMPILE_S)"
            said = os.read(helper.stdout.fileno(), _LOG_BYTES)
            return "" if said == _DONE else f"ended: {said.decode(errors='replace')}"
        except OSError as error:
            return f"ended: {error}"

    @contextmanager
    def _counted(self) -> Iterator[None]:
        total_s, began_s = self._waited[0], time.monotonic()
        self._waited = total_s, began_s
        try:
            yield
        finally:
            self._waited = total_s + time.monotonic() - began_s, None

    @contextmanager
    def _filler_stopped(self) -> Iterator[None]:
        """The lowest priority is not low enough: two processors may be two threads of one core."""
        filler = self._filler
        if filler is None:
            yield
            return
        filler.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            filler.send_signal(signal.SIGCONT)

    def _waited_until_now_s(self) -> float:
        total_s, began_s = self._waited
        return total_s if began_s is None else total_s + time.monotonic() - began_s

    def _end_helper(self) -> None:
        with self._asking:
            helper, self._helper = self._helper, None
        if helper is not None:
            helper.kill()
            helper.communicate()


def _environment() -> dict[str, str]:
    path = os.pathsep.join(folder or os.curdir for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _main(work: str, memory_bytes: str, parent: str) -> int:
    limits.die_with_parent()
    if os.getppid() != int(parent):  # it ended before
        return 1
    Limits(int(memory_bytes), _CPU_S).apply()
    if work == _FILL:
        return 0 if keep_all() else 1
    while True:
        try:
            compile_kernel(*pickle.load(sys.stdin.buffer))
        except EOFError:
            return 0
        sys.stdout.buffer.write(_DONE)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
