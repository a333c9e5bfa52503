import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator
from functools import partial
from typing import TypeVar

import pytest

from service.engine.batch import Excuse, Ran
from service.engine.worker import Worker
from service.errors import DeadlineExceededError, ModelNotReadyError, OverloadedError

T = TypeVar("T")


class Gate:
    """A call that ends when it is told to."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.opened.wait(10)
        return "through"


class Payload:
    """Something that can be seen to go away."""


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker("test worker", queue_size=2)
    yield worker
    await worker.close()


def _same(value: T) -> T:
    return value


def _slow_seven() -> int:
    time.sleep(0.02)
    return 7


async def _occupied(worker: Worker) -> tuple[Gate, asyncio.Task[Ran[str]]]:
    gate = Gate()
    running = asyncio.create_task(worker.submit(gate, deadline_s=10))
    await asyncio.to_thread(gate.entered.wait, 10)
    return gate, running


async def test_submit_returns_the_result_and_both_times(worker: Worker) -> None:
    ran = await worker.submit(_slow_seven, deadline_s=10)

    assert ran.result == 7
    assert ran.queue_ns > 0
    assert ran.compute_ns >= 20_000_000
    assert (ran.batch_rows, ran.is_first) == (1, True)


async def test_calls_run_in_order_in_the_workers_thread(worker: Worker) -> None:
    gate, running = await _occupied(worker)
    seen: list[tuple[int, str]] = []

    def record(number: int) -> None:
        seen.append((number, threading.current_thread().name))

    waiting = [asyncio.create_task(worker.submit(partial(record, n), deadline_s=10)) for n in range(2)]
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(running, *waiting)

    assert seen == [(0, "test worker"), (1, "test worker")]


async def test_full_queue_refuses_at_once_and_takes_again_when_there_is_room(worker: Worker) -> None:
    gate, running = await _occupied(worker)
    waiting = [asyncio.create_task(worker.submit(lambda: "waited", deadline_s=10)) for _ in range(2)]
    await asyncio.sleep(0)

    with pytest.raises(OverloadedError, match="test worker: 2 requests wait"):
        await worker.submit(lambda: None, deadline_s=10)

    gate.opened.set()
    assert (await running).result == "through"
    assert [(await task).result for task in waiting] == ["waited", "waited"]
    assert (await worker.submit(lambda: "after", deadline_s=10)).result == "after"


async def test_deadline_in_the_queue_drops_the_call(worker: Worker) -> None:
    gate, running = await _occupied(worker)
    ran = threading.Event()

    with pytest.raises(DeadlineExceededError, match=r"0\.05 s") as caught:
        await worker.submit(ran.set, deadline_s=0.05)

    assert caught.value.details == {"deadline_s": 0.05}
    assert worker.waiting == 0
    gate.opened.set()
    await running
    await worker.submit(lambda: None, deadline_s=10)
    assert not ran.is_set()


async def test_deadline_that_passes_while_the_loop_is_busy_drops_the_call(worker: Worker) -> None:
    gate, running = await _occupied(worker)
    ran = threading.Event()
    late = asyncio.create_task(worker.submit(ran.set, deadline_s=0.01))
    await asyncio.sleep(0)
    threading.Timer(0.05, gate.opened.set).start()
    time.sleep(0.2)  # noqa: ASYNC251 - the loop must be late, so that the worker is first to see the deadline

    with pytest.raises(DeadlineExceededError):
        await late
    await running
    assert not ran.is_set()


async def test_deadline_of_a_running_call_answers_its_caller_and_lets_it_end(worker: Worker) -> None:
    gate = Gate()
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await worker.submit(gate, deadline_s=0.05)
    assert time.monotonic() - started < 5

    gate.opened.set()
    assert (await worker.submit(lambda: "next", deadline_s=10)).result == "next"


async def test_cancelled_caller_takes_its_call_out_of_the_queue(worker: Worker) -> None:
    gate, running = await _occupied(worker)
    ran = threading.Event()
    waiting = [asyncio.create_task(worker.submit(ran.set, deadline_s=10)) for _ in range(2)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

    assert worker.waiting == 0
    gate.opened.set()
    await running
    await worker.submit(lambda: None, deadline_s=10)
    assert not ran.is_set()


async def test_cancelled_caller_of_a_running_call_leaves_the_worker_working(worker: Worker) -> None:
    gate, running = await _occupied(worker)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gate.opened.set()
    assert (await worker.submit(lambda: "next", deadline_s=10)).result == "next"


@pytest.mark.parametrize("error", [ValueError("no"), StopIteration(), SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_failing_call_fails_only_its_caller(worker: Worker, error: BaseException) -> None:
    def fail() -> None:
        raise error

    failed, passed = await asyncio.gather(
        worker.submit(fail, deadline_s=10), worker.submit(lambda: "fine", deadline_s=10), return_exceptions=True
    )

    assert isinstance(failed, ValueError if isinstance(error, ValueError) else RuntimeError)
    assert isinstance(passed, Ran)
    assert passed.result == "fine"


async def test_failed_call_holds_no_memory(worker: Worker) -> None:
    gc.disable()
    try:
        payload = Payload()
        alive = weakref.ref(payload)

        def fail(held: Payload = payload) -> None:
            raise ValueError(f"{held}")

        with pytest.raises(ValueError, match="Payload") as caught:
            await worker.submit(fail, deadline_s=10)
        del payload, fail, caught
        await asyncio.sleep(0.05)  # the loop holds the future of the step that runs
        assert alive() is None
    finally:
        gc.enable()


async def test_idle_worker_holds_neither_call_nor_result(worker: Worker) -> None:
    gc.disable()
    try:
        payload = Payload()
        alive = weakref.ref(payload)
        result = (await worker.submit(partial(_same, payload), deadline_s=10)).result
        assert result is payload
        del payload, result
        await asyncio.sleep(0.05)
        assert alive() is None
    finally:
        gc.enable()


async def test_close_finishes_what_runs_and_refuses_what_waits() -> None:
    worker = Worker("closing worker", queue_size=2)
    gate, running = await _occupied(worker)
    waiting = asyncio.create_task(worker.submit(lambda: "never", deadline_s=10))
    await asyncio.sleep(0)
    closing = asyncio.create_task(worker.close())

    with pytest.raises(ModelNotReadyError, match="closing worker"):
        await waiting
    with pytest.raises(ModelNotReadyError):
        await worker.submit(lambda: None, deadline_s=10)
    assert not closing.done()
    gate.opened.set()
    assert (await running).result == "through"
    await closing
    await worker.close()
    assert "closing worker" not in [thread.name for thread in threading.enumerate()]


async def test_many_callers_get_their_own_results_and_leave_nothing_behind() -> None:
    worker = Worker("busy worker", queue_size=500)
    for _ in range(4):
        results = await asyncio.gather(*(worker.submit(partial(_same, n), deadline_s=10) for n in range(500)))
        assert [ran.result for ran in results] == list(range(500))
    assert worker.waiting == 0
    await worker.close()


def test_worker_ends_when_its_loop_is_gone() -> None:
    gate = Gate()

    async def abandon() -> None:
        worker = Worker("abandoned worker", queue_size=1)
        with pytest.raises(DeadlineExceededError):
            await worker.submit(gate, deadline_s=0.01)

    asyncio.run(abandon())
    gate.opened.set()
    thread = next((thread for thread in threading.enumerate() if thread.name == "abandoned worker"), None)
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


async def test_drain_waits_for_what_was_submitted_even_behind_a_full_queue(worker: Worker) -> None:
    gate, running = await _occupied(worker)
    waiting = [asyncio.create_task(worker.submit(partial(_same, n), deadline_s=10)) for n in range(2)]
    await asyncio.sleep(0)
    draining = asyncio.create_task(worker.drain())
    await asyncio.sleep(0.05)
    assert not draining.done()
    gate.opened.set()
    await draining
    assert running.done()
    assert [(await task).result for task in waiting] == [0, 1]
    await worker.close()
    await worker.drain()


async def test_excused_waiting_puts_off_the_deadline_of_what_runs_and_of_what_waits() -> None:
    worker = Worker("test worker", queue_size=2, excuse=Excuse(time.monotonic, most_s=60, from_s=0.02))
    gate = Gate()
    calls = [asyncio.create_task(worker.submit(call, deadline_s=0.02)) for call in (gate, lambda: "waited")]
    await asyncio.sleep(0.1)
    gate.opened.set()
    assert [(await call).result for call in calls] == ["through", "waited"]
    await worker.close()


@pytest.mark.parametrize(
    "excuse",
    [
        Excuse(time.monotonic, most_s=0.02, from_s=0.02),
        Excuse(time.monotonic, most_s=60, from_s=0.03),
        Excuse(lambda: 5.0, most_s=60, from_s=0.02),
    ],
    ids=["not for ever", "not against the caller's wish", "not for what was before"],
)
async def test_excuses_have_bounds(excuse: Excuse) -> None:
    worker = Worker("test worker", queue_size=2, excuse=excuse)
    gate = Gate()
    with pytest.raises(DeadlineExceededError):
        await asyncio.wait_for(worker.submit(gate, deadline_s=0.02), 5)
    gate.opened.set()
    await worker.close()
