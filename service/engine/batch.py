"""What a worker runs: calls, alone or joined into batches.

What is made for every call is a named tuple, which takes a third of the time of a frozen dataclass.
"""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

from service.errors import DeadlineExceededError

T = TypeVar("T")


class Part(NamedTuple):
    """What a call would bring into a batch. Calls of one group may run together.

    Attributes:
        group: equal for calls whose inputs can be joined along their first axis.
        rows: length of that axis.
        size_bytes: bytes of the inputs.
        content: what `Batching.run` gets.
    """

    group: Hashable
    rows: int
    size_bytes: int
    content: Any


@dataclass(frozen=True, slots=True)
class Batching:
    """How far calls are joined, and how the joined ones are run.

    Attributes:
        max_rows: rows of one batch.
        max_bytes: bytes of its inputs.
        max_delay_s: how long the first call of a batch may wait for others; 0 joins only what waits already.
        is_cost_known: what a run takes follows from its group and rows, and is all computed in the thread that runs
            it; those known to be brief run in the event loop.
        run: takes the contents of several parts and the seconds until the last of their deadlines; returns one result
            each. If it raises, the calls are run one by one, so that a call fails by its own fault only.
    """

    max_rows: int
    max_bytes: int
    max_delay_s: float
    is_cost_known: bool
    run: Callable[[Sequence[Any], float], Sequence[Any]]


class Ran(NamedTuple, Generic[T]):
    """A call's result, nanoseconds in the queue and in the run, and the execution it was in.

    `batch_rows` are the rows of that execution; `is_first` is true for one of its calls, so that executions can be
    counted.
    """

    result: T
    queue_ns: int
    compute_ns: int
    batch_rows: int
    is_first: bool


class Excuse(NamedTuple):
    """Waiting that is charged to no call, such as that for its kernel to be compiled.

    Attributes:
        waited_s: seconds of it until now.
        most_s: what it may put a deadline off by, at most.
        from_s: deadlines below this are the caller's own wish, and are kept.
    """

    waited_s: Callable[[], float]
    most_s: float
    from_s: float


_NO_PART = Part(None, 1, 0, None)


class Batch:
    """Calls that will run together."""

    def __init__(self, first: "Task[Any]") -> None:
        self.tasks = [first]
        self.group, self.rows, self.size_bytes, _ = first.part or _NO_PART

    def takes(self, task: "Task[Any]", limits: Batching) -> bool:
        """Add the task if there is room for it, and it is of this group."""
        if task.part is None:
            return False
        group, rows, size_bytes, _ = task.part
        rows += self.rows
        size_bytes += self.size_bytes
        if rows > limits.max_rows or size_bytes > limits.max_bytes or group != self.group:
            return False
        self.tasks.append(task)
        self.rows, self.size_bytes = rows, size_bytes
        return True


class Task(Generic[T]):
    """A call, who waits for it and until when, and what came of it."""

    __slots__ = (
        "_deadline_s",
        "_error",
        "_excuse",
        "_excused_before_s",
        "_ran",
        "_started_ns",
        "call",
        "enqueued_ns",
        "future",
        "part",
        "timer",
    )

    def __init__(
        self,
        call: Callable[[], T],
        future: asyncio.Future[Ran[T]],
        deadline_s: float,
        part: Part | None,
        excuse: Excuse | None = None,
    ) -> None:
        self.future = future
        self.call = call
        self.part = part
        self.timer: asyncio.TimerHandle | None = None
        self._deadline_s = deadline_s
        self.enqueued_ns = time.perf_counter_ns()
        self._started_ns = 0
        self._ran: Ran[T] | None = None
        self._error: BaseException | None = None
        self._excuse = excuse if excuse is not None and deadline_s >= excuse.from_s else None
        self._excused_before_s = 0.0 if self._excuse is None else self._excuse.waited_s()

    @property
    def rows(self) -> int:
        return 1 if self.part is None else self.part.rows

    def remaining_s(self) -> float:
        return max(0.0, self._allowed_s() - (time.perf_counter_ns() - self.enqueued_ns) / 1e9)

    def begin(self, name: str, now_ns: int) -> bool:
        """Where it runs: False if it is too late, or nobody waits any more, and the call must not run."""
        self._started_ns = now_ns
        if now_ns - self.enqueued_ns > self._allowed_s() * 1e9:
            self._error = self.deadline_error(name)
        return self._error is None and not self.future.done()

    def end(
        self, result: T | None, error: BaseException | None, now_ns: int, *, batch_rows: int, is_first: bool
    ) -> None:
        self._error = error
        queue_ns, compute_ns = self._started_ns - self.enqueued_ns, now_ns - self._started_ns
        self._ran = Ran(cast("T", result), queue_ns, compute_ns, batch_rows, is_first)

    def deliver(self) -> None:
        """In the event loop."""
        if self._error is not None:
            self.refuse(self._error)
        elif not self.future.done() and self._ran is not None:
            self.future.set_result(self._ran)

    def refuse(self, error: BaseException) -> None:
        if self.future.done():
            return
        self.future.set_exception(error)

    def _allowed_s(self) -> float:
        if self._excuse is None:
            return self._deadline_s
        return self._deadline_s + min(self._excuse.waited_s() - self._excused_before_s, self._excuse.most_s)

    def deadline_error(self, name: str) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"{name}: not finished within its deadline of {self._deadline_s:g} s", deadline_s=self._deadline_s
        )
