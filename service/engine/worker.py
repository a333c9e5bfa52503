"""Worker: one thread that runs one call after another, behind a bounded queue."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from service.errors import DeadlineExceededError, ModelNotReadyError, OverloadedError

T = TypeVar("T")


class Worker:
    """Runs calls in one daemon thread, first in, first out. It belongs to the event loop it was made in."""

    def __init__(self, name: str, queue_size: int) -> None:
        self.name = name
        self._queue_size = queue_size
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._changed = threading.Condition()
        self._waiting: deque[_Task[Any]] = deque()
        self._is_running = False
        self._is_closed = False
        self._finished: deque[_Task[Any]] = deque()
        self._is_wake_scheduled = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def submit(self, call: Callable[[], T], *, deadline_s: float) -> tuple[T, int, int]:
        """The call's result, nanoseconds in the queue, nanoseconds in the call.

        At the deadline the caller gets DeadlineExceededError: a call that still waits is dropped and never runs,
        one that runs cannot be interrupted and ends in the background. A cancelled caller drops its call likewise.

        Raises:
            OverloadedError: the queue is full.
            DeadlineExceededError: the deadline passed.
            ModelNotReadyError: the worker is closed.
        """
        task = _Task(call, self._loop.create_future(), deadline_s)
        self._enqueue(task)
        timer = self._loop.call_later(deadline_s, self._expire, task)
        try:
            return await task.future
        except BaseException:
            self._drop(task)
            raise
        finally:
            timer.cancel()
            del task  # for the reason given in _step

    async def drain(self) -> None:
        """Return when every call submitted so far has ended: an empty call, for which the queue is never too full."""
        task = _Task(_nothing, self._loop.create_future(), math.inf)
        with self._changed:
            if self._is_closed:
                return
            self._waiting.append(task)
            self._changed.notify()
        await task.future

    def stop(self) -> None:
        """Refuse new calls and those that wait; what runs finishes."""
        with self._changed:
            self._is_closed = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for task in refused:
            task.refuse(self._closed_error())

    async def close(self) -> None:
        """Stop, and return when the thread has ended."""
        self.stop()
        await asyncio.shield(self._stopped)
        self._thread.join()

    def _enqueue(self, task: "_Task[Any]") -> None:
        with self._changed:
            if self._is_closed:
                raise self._closed_error()
            if len(self._waiting) + self._is_running > self._queue_size:
                raise OverloadedError(f"{self.name}: {self._queue_size} requests wait already; try again")
            self._waiting.append(task)
            self._changed.notify()

    def _closed_error(self) -> ModelNotReadyError:
        return ModelNotReadyError(f"{self.name} is being unloaded")

    def _expire(self, task: "_Task[Any]") -> None:
        task.refuse(task.deadline_error(self.name))

    def _drop(self, task: "_Task[Any]") -> None:
        with self._changed:
            if task in self._waiting:
                self._waiting.remove(task)

    def _run(self) -> None:
        try:
            while self._step():
                pass
            self._loop.call_soon_threadsafe(self._stopped.set_result, None)
        except RuntimeError:
            return  # the event loop was closed under a worker that nobody closed: nobody waits for results

    def _step(self) -> bool:
        """One call; its inputs and result are let go when this frame ends, not when the next call comes."""
        task = self._take()
        if task is None:
            return False
        if task.begin(self.name):
            task.end(*_outcome(task.call))
        self._is_running = False
        self._finished.append(task)
        del task  # an error's traceback holds this frame; through the task the error would hold itself
        if not self._is_wake_scheduled:  # the loop wakes once for results that come faster than it takes them
            self._is_wake_scheduled = True
            self._loop.call_soon_threadsafe(self._deliver)
        return True

    def _take(self) -> "_Task[Any] | None":
        with self._changed:
            while not self._waiting:
                if self._is_closed:
                    return None
                self._changed.wait()
            self._is_running = True
            return self._waiting.popleft()

    def _deliver(self) -> None:
        self._is_wake_scheduled = False  # before draining: a result that comes meanwhile schedules a new wake-up
        while self._finished:
            self._finished.popleft().deliver()


class _Task(Generic[T]):
    """A call, who waits for it and until when, and what came of it."""

    __slots__ = ("_deadline_s", "_ended_ns", "_enqueued_ns", "_error", "_result", "_started_ns", "call", "future")

    def __init__(self, call: Callable[[], T], future: asyncio.Future[tuple[T, int, int]], deadline_s: float) -> None:
        self.future = future
        self.call = call
        self._deadline_s = deadline_s
        self._enqueued_ns = time.perf_counter_ns()
        self._started_ns = 0
        self._ended_ns = 0
        self._result: T | None = None
        self._error: BaseException | None = None

    def begin(self, name: str) -> bool:
        """In the worker thread: False if it is too late, or nobody waits any more, and the call must not run."""
        self._started_ns = time.perf_counter_ns()
        if self._started_ns - self._enqueued_ns > self._deadline_s * 1e9:
            self._error = self.deadline_error(name)
        return self._error is None and not self.future.done()

    def end(self, result: T | None, error: BaseException | None) -> None:
        self._ended_ns = time.perf_counter_ns()
        self._result = result
        self._error = error

    def deliver(self) -> None:
        """In the event loop."""
        if self._error is not None:
            self.refuse(self._error)
        elif not self.future.done():
            queue_ns, compute_ns = self._started_ns - self._enqueued_ns, self._ended_ns - self._started_ns
            self.future.set_result((cast("T", self._result), queue_ns, compute_ns))

    def refuse(self, error: BaseException) -> None:
        if self.future.done():
            return
        self.future.set_exception(error)

    def deadline_error(self, name: str) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"{name}: not finished within its deadline of {self._deadline_s:g} s", deadline_s=self._deadline_s
        )


def _nothing() -> None: ...


def _outcome(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return call(), None
    except StopIteration as error:  # the one exception that a future does not take
        return None, RuntimeError(f"the call raised {error!r}")
    except Exception as error:  # noqa: BLE001 - a failing call fails its own caller only
        return None, error
    except BaseException as error:  # noqa: BLE001 - an exit asked for inside a call must not end the thread
        return None, RuntimeError(f"the call raised {error!r}")
