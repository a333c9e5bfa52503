"""Worker: threads that run calls first in, first out, behind a bounded queue; calls that may are run together.

Two changes of thread, and the fight for the interpreter that comes with them, take 100 to 300 us. Batches that have
lately taken less than that run in the event loop, as small JSON is parsed there.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from service.engine.batch import Batch, Batching, Excuse, Part, Ran, Task
from service.engine.pace import Pace
from service.errors import ModelNotReadyError, OverloadedError

T = TypeVar("T")


class Worker:
    """Runs calls in daemon threads, first in, first out. It belongs to the event loop it was made in."""

    def __init__(
        self,
        name: str,
        queue_size: int,
        *,
        threads: int = 1,
        batching: Batching | None = None,
        excuse: Excuse | None = None,
    ) -> None:
        self.name = name
        self._excuse = excuse
        self._queue_size = queue_size
        self._batching = batching
        self._runs_brief = batching is not None and batching.is_cost_known and batching.max_delay_s == 0
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._changed = threading.Condition()
        self._arrived: list[Task[Any]] = []
        self._waiting: deque[Task[Any]] = deque()
        self._running = 0
        self._pace = Pace()
        self._is_closed = False
        self._finished: deque[Task[Any]] = deque()
        self._is_wake_scheduled = False
        self._idle: list[asyncio.Future[None]] = []
        self._alive = threads
        names = [name] if threads == 1 else [f"{name} #{number}" for number in range(threads)]
        self._threads = [threading.Thread(target=self._run, name=title, daemon=True) for title in names]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return len(self._arrived) + len(self._waiting)

    async def submit(self, call: Callable[[], T], *, deadline_s: float, part: Part | None = None) -> Ran[T]:
        """Run the call, or its part in a batch.

        At the deadline the caller gets DeadlineExceededError: a call that still waits is dropped and never runs,
        one that runs cannot be interrupted and ends in the background. A cancelled caller drops its call likewise.

        Raises:
            OverloadedError: the queue is full.
            DeadlineExceededError: the deadline passed.
            ModelNotReadyError: the worker is closed.
        """
        joined = part if self._batching is not None else None
        task = Task(call, self._loop.create_future(), deadline_s, joined, self._excuse)
        self._enqueue(task)
        try:
            return await task.future
        except BaseException:
            self._drop(task)
            raise
        finally:
            if task.timer is not None:
                task.timer.cancel()
            del task  # for the reason given in _step

    def run_now(
        self, calls: Sequence[tuple[Callable[[], T], Part | None]], *, deadline_s: float
    ) -> list[Ran[T] | None]:
        """Run in the event loop, joined as `submit` would join them, the calls that are known to be brief.

        What `submit` was given in this turn of the loop comes first: if it were left to the end of the turn, calls
        would be refused in its favour turn after turn. None for a call that did not run, or failed: `submit` is for
        those.
        """
        if self._is_closed or not self._runs_brief:
            return [None] * len(calls)
        tasks = [Task(call, self._loop.create_future(), deadline_s, part) for call, part in calls]
        own = {id(task) for task in tasks}
        self._arrived = [task for task in self._run_brief([*self._arrived, *tasks]) if id(task) not in own]
        return [
            task.future.result() if task.future.done() and task.future.exception() is None else None for task in tasks
        ]

    async def drain(self) -> None:
        """Return once nothing waits or runs."""
        idle = self._loop.create_future()
        with self._changed:
            if self._is_closed or not (self._arrived or self._waiting or self._running):
                return
            self._idle.append(idle)
        await idle

    def stop(self) -> None:
        """Refuse new calls and those that wait; what runs finishes."""
        with self._changed:
            self._is_closed = True
            refused = [*self._waiting, *self._arrived]
            self._waiting.clear()
            self._arrived.clear()
            self._changed.notify_all()
        for task in refused:
            task.refuse(self._closed_error())

    async def close(self) -> None:
        """Stop, and return when the threads have ended."""
        self.stop()
        await asyncio.shield(self._stopped)
        for thread in self._threads:
            thread.join()
        self._wake_drains()

    def _enqueue(self, task: Task[Any]) -> None:
        """Keep the task until this turn of the loop ends: calls that come in one turn wake the threads once.

        Waking them for each would cost every call a fight for the interpreter, and leave nothing to join.
        """
        if self._is_closed:
            raise self._closed_error()
        if self.waiting + self._running > self._queue_size:
            raise OverloadedError(f"{self.name}: {self._queue_size} requests wait already; try again")
        if not self._arrived:
            self._loop.call_soon(self._hand_over)
        self._arrived.append(task)

    def _hand_over(self) -> None:
        if self._runs_brief:
            self._arrived = self._run_brief(self._arrived)
            self._wake_drains()
        for task in self._arrived:  # a timer costs as much as a brief run: only those who wait for a thread need one
            task.timer = self._loop.call_later(task.remaining_s(), self._expire, task)
        if self._arrived:
            with self._changed:
                self._waiting.extend(self._arrived)
                self._arrived.clear()
                self._changed.notify_all()  # one thread may wait for calls of its batch, another for any call

    def _run_brief(self, arrived: list[Task[Any]]) -> list[Task[Any]]:
        """In the event loop: the batches that are brief, while the threads have nothing to do; the rest is returned."""
        assert self._batching is not None
        while arrived and not self._waiting and not self._running:
            batch = Batch(arrived[0])
            others = [task for task in arrived[1:] if not batch.takes(task, self._batching)]
            if batch.group is None or not self._pace.is_brief(batch.group, batch.rows):
                break
            arrived = others
            self._execute(batch, in_thread=False)
            for task in batch.tasks:
                task.deliver()
        return arrived

    def _closed_error(self) -> ModelNotReadyError:
        return ModelNotReadyError(f"{self.name} is being unloaded")

    def _expire(self, task: Task[Any]) -> None:
        remaining_s = task.remaining_s()
        if remaining_s > 0:
            task.timer = self._loop.call_later(remaining_s, self._expire, task)
            return
        task.refuse(task.deadline_error(self.name))

    def _drop(self, task: Task[Any]) -> None:
        with self._changed:
            for tasks in (self._arrived, self._waiting):
                if task in tasks:
                    tasks.remove(task)
        self._wake_drains()

    def _run(self) -> None:
        try:
            while self._step():
                pass
            with self._changed:
                self._alive -= 1
                is_last = self._alive == 0
            if is_last:
                self._loop.call_soon_threadsafe(self._stopped.set_result, None)
        except RuntimeError:
            return  # the event loop was closed under a worker that nobody closed: nobody waits for results

    def _step(self) -> bool:
        """One execution; its inputs and results are let go when this frame ends, not when the next call comes."""
        batch = self._take()
        if batch is None:
            return False
        self._execute(batch, in_thread=True)
        tasks = batch.tasks
        with self._changed:
            self._running -= len(tasks)
            # under the lock: several threads finish
            self._finished.extend(tasks)
            must_wake, self._is_wake_scheduled = not self._is_wake_scheduled, True
        del tasks, batch  # an error's traceback holds this frame; through the task the error would hold itself
        if must_wake:  # the loop wakes once for results that come faster than it takes them
            self._loop.call_soon_threadsafe(self._deliver)
        return True

    def _take(self) -> Batch | None:
        """The next call and those that may run with it; None when the worker is closed."""
        with self._changed:
            while not self._waiting:
                if self._is_closed:
                    return None
                self._changed.wait()
            batch = Batch(self._waiting.popleft())
            self._running += 1
            if self._batching is not None and batch.group is not None:
                self._fill(batch, self._batching)
            return batch

    def _fill(self, batch: Batch, limits: Batching) -> None:
        """Add calls of the batch's group, in their order; wait for more while there is time and nobody else waits."""
        until = batch.tasks[0].enqueued_ns / 1e9 + limits.max_delay_s
        while True:
            for task in [task for task in self._waiting if batch.takes(task, limits)]:
                self._waiting.remove(task)
                self._running += 1
            remaining_s = until - time.perf_counter()
            if self._waiting or batch.rows >= limits.max_rows or remaining_s <= 0 or self._is_closed:
                return
            self._changed.wait(remaining_s)

    def _execute(self, batch: Batch, *, in_thread: bool) -> None:
        started_ns, computed_s = time.perf_counter_ns(), time.thread_time()
        ready = [task for task in batch.tasks if task.begin(self.name, started_ns)]
        if len(ready) < 2 or not self._execute_together(ready):
            for task in ready:
                if task.begin(self.name, time.perf_counter_ns()):
                    task.end(*_outcome(task.call), time.perf_counter_ns(), batch_rows=task.rows, is_first=True)
                del task  # for the reason given in _step
        if batch.group is not None:
            self._pace.add(batch.group, batch.rows, time.thread_time() - computed_s, in_thread=in_thread)
        del batch, ready

    def _execute_together(self, tasks: list[Task[Any]]) -> bool:
        assert self._batching is not None
        run = self._batching.run
        contents = [task.part.content for task in tasks if task.part is not None]
        remaining_s = max([task.remaining_s() for task in tasks])
        results, error = _outcome(lambda: run(contents, remaining_s))
        if error is not None or results is None:
            return False
        rows, now_ns = sum([task.rows for task in tasks]), time.perf_counter_ns()
        for task, result in zip(tasks, results, strict=True):
            task.end(result, None, now_ns, batch_rows=rows, is_first=task is tasks[0])
        return True

    def _deliver(self) -> None:
        self._is_wake_scheduled = False  # before draining: a result that comes meanwhile schedules a new wake-up
        while self._finished:
            self._finished.popleft().deliver()
        self._wake_drains()

    def _wake_drains(self) -> None:
        while self._idle and not self.waiting and not self._running:
            idle = self._idle.pop()
            if not idle.done():
                idle.set_result(None)


def _outcome(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return call(), None
    except StopIteration as error:  # the one exception that a future does not take
        return None, RuntimeError(f"the call raised {error!r}")
    except Exception as error:  # noqa: BLE001 - a failing call fails its own caller only
        return None, error
    except BaseException as error:  # noqa: BLE001 - an exit asked for inside a call must not end the thread
        return None, RuntimeError(f"the call raised {error!r}")
