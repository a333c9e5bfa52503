import asyncio
import threading
import time
from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.batch import Batching, Part, Ran
from service.engine.worker import Worker
from service.errors import DeadlineExceededError


class Runs:
    """Doubles numbers in batches and remembers what ran together."""

    def __init__(self, *, fails: bool = False) -> None:
        self.together: list[list[int]] = []
        self.fails = fails

    def __call__(self, contents: Sequence[int], deadline_s: float) -> list[int]:
        self.together.append(list(contents))
        if self.fails:
            raise ValueError("the batch")
        return [2 * content for content in contents]


class Gate:
    """A call that ends when it is told to."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> int:
        self.entered.set()
        assert self.opened.wait(10)
        return 0


def _batching(
    run: Runs, *, max_rows: int = 8, max_bytes: int = 1000, max_delay_s: float = 0.0, is_cost_known: bool = True
) -> Batching:
    return Batching(
        max_rows=max_rows, max_bytes=max_bytes, max_delay_s=max_delay_s, is_cost_known=is_cost_known, run=run
    )


def _alone(content: int) -> int:
    if content < 0:
        raise ValueError(f"{content} alone")
    return 2 * content


async def _submit(
    worker: Worker, content: int, *, group: str = "a", rows: int = 1, size_bytes: int = 1, deadline_s: float = 10
) -> Ran[int]:
    part = Part(group, rows, size_bytes, content)
    return await worker.submit(partial(_alone, content), deadline_s=deadline_s, part=part)


async def _behind_a_gate(worker: Worker) -> tuple[Gate, asyncio.Task[Ran[int]]]:
    gate = Gate()
    running = asyncio.create_task(worker.submit(gate, deadline_s=10))
    await asyncio.to_thread(gate.entered.wait, 10)
    return gate, running


async def test_waiting_calls_of_one_group_run_together_and_keep_their_results() -> None:
    run = Runs()
    worker = Worker("batches", 20, batching=_batching(run))
    gate, running = await _behind_a_gate(worker)
    groups = "aabab"
    tasks = [asyncio.create_task(_submit(worker, n, group=group)) for n, group in enumerate(groups)]
    await asyncio.sleep(0)
    gate.opened.set()
    ran = await asyncio.gather(*tasks)
    await running
    await worker.close()

    assert run.together == [[0, 1, 3], [2, 4]]
    assert [one.result for one in ran] == [0, 2, 4, 6, 8]
    assert [one.batch_rows for one in ran] == [3, 3, 2, 3, 2]
    assert [one.is_first for one in ran] == [True, False, True, False, False]


async def test_batches_are_bounded_in_rows_and_in_bytes() -> None:
    run = Runs()
    worker = Worker("batches", 20, batching=_batching(run, max_rows=4, max_bytes=100))
    gate, running = await _behind_a_gate(worker)
    sizes = [(3, 10), (2, 10), (1, 10), (1, 95), (9, 10)]
    tasks = [
        asyncio.create_task(_submit(worker, n, rows=rows, size_bytes=size)) for n, (rows, size) in enumerate(sizes)
    ]
    await asyncio.sleep(0)
    gate.opened.set()
    ran = await asyncio.gather(*tasks)
    await running
    await worker.close()

    assert run.together == [[0, 2]]  # 1 would be five rows, 3 too many bytes for 1; 4 is over the limit by itself
    assert [one.batch_rows for one in ran] == [4, 2, 4, 1, 9]
    assert [one.result for one in ran] == [0, 2, 4, 6, 8]


@pytest.mark.alone
async def test_call_waits_for_company_no_longer_than_the_delay() -> None:
    run = Runs()
    worker = Worker("batches", 20, batching=_batching(run, max_rows=2, max_delay_s=0.2))
    started = time.perf_counter()
    alone = await _submit(worker, 1)
    waited_s = time.perf_counter() - started
    first = asyncio.create_task(_submit(worker, 2))
    await asyncio.sleep(0.05)
    started = time.perf_counter()
    await _submit(worker, 3)
    full_s = time.perf_counter() - started
    await first
    await worker.close()

    assert 0.19 < waited_s < 2
    assert alone.batch_rows == 1
    assert run.together == [[2, 3]]
    assert full_s < 0.15  # a full batch does not wait


async def test_call_of_another_group_is_not_kept_waiting_by_the_delay() -> None:
    worker = Worker("batches", 20, batching=_batching(Runs(), max_delay_s=5.0))
    patient = asyncio.create_task(_submit(worker, 1, group="a"))
    await asyncio.sleep(0.02)
    started = time.perf_counter()
    other = asyncio.create_task(worker.submit(partial(_alone, 2), deadline_s=10))

    assert (await patient).result == 2
    assert (await other).result == 4
    assert time.perf_counter() - started < 2
    await worker.close()


async def test_close_does_not_wait_for_the_delay() -> None:
    worker = Worker("batches", 20, batching=_batching(Runs(), max_delay_s=5.0))
    patient = asyncio.create_task(_submit(worker, 1))
    await asyncio.sleep(0.02)
    started = time.perf_counter()
    await worker.close()

    assert (await patient).result == 2  # it was taken, so it runs
    assert time.perf_counter() - started < 2


async def test_error_in_a_batch_fails_only_the_call_that_is_at_fault() -> None:
    run = Runs(fails=True)
    worker = Worker("batches", 20, batching=_batching(run))
    gate, running = await _behind_a_gate(worker)
    tasks = [asyncio.create_task(_submit(worker, content)) for content in (1, -2, 3)]
    await asyncio.sleep(0)
    gate.opened.set()
    first, failed, third = await asyncio.gather(*tasks, return_exceptions=True)
    await running
    await worker.close()

    assert run.together == [[1, -2, 3]]
    assert isinstance(first, Ran)
    assert (first.result, first.batch_rows, first.is_first) == (2, 1, True)
    assert isinstance(failed, ValueError)
    assert str(failed) == "-2 alone"
    assert isinstance(third, Ran)
    assert third.result == 6


async def test_call_that_nobody_waits_for_is_not_in_the_batch() -> None:
    run = Runs()
    worker = Worker("batches", 20, batching=_batching(run))
    gate, running = await _behind_a_gate(worker)
    tasks = [asyncio.create_task(_submit(worker, n)) for n in range(3)]
    late = asyncio.create_task(_submit(worker, 9, deadline_s=0.01))
    await asyncio.sleep(0)
    tasks[1].cancel()
    with pytest.raises(DeadlineExceededError):
        await late
    gate.opened.set()
    await asyncio.gather(tasks[0], tasks[2], running)
    await worker.close()

    assert run.together == [[0, 2]]


async def test_instances_run_at_the_same_time() -> None:
    worker = Worker("two", 20, threads=2)
    gates = [await _behind_a_gate(worker) for _ in range(2)]
    third = asyncio.create_task(worker.submit(partial(_alone, 1), deadline_s=10))
    await asyncio.sleep(0.05)
    assert not third.done()
    gates[1][0].opened.set()
    assert (await third).result == 2
    assert not gates[0][1].done()
    gates[0][0].opened.set()
    await worker.drain()
    assert gates[0][1].done()
    await worker.close()


async def test_drain_ends_when_what_waited_is_cancelled() -> None:
    worker = Worker("drained", 20)
    gate, running = await _behind_a_gate(worker)
    waiting = asyncio.create_task(worker.submit(partial(_alone, 1), deadline_s=10))
    draining = asyncio.create_task(worker.drain())
    await asyncio.sleep(0.02)
    waiting.cancel()
    gate.opened.set()
    await asyncio.wait_for(draining, 5)
    assert running.done()
    await worker.close()


@settings(deadline=None, max_examples=30)
@given(
    calls=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5), st.integers(1, 60)), max_size=25),
    threads=st.integers(1, 3),
    max_rows=st.integers(1, 8),
)
def test_every_call_is_run_once_within_the_bounds(
    calls: list[tuple[str, int, int]], threads: int, max_rows: int
) -> None:
    run = Runs()

    async def scenario() -> list[Ran[int]]:
        batching = _batching(run, max_rows=max_rows, max_bytes=100)
        worker = Worker("property", 100, threads=threads, batching=batching)
        submitted = [
            _submit(worker, number, group=group, rows=rows, size_bytes=size)
            for number, (group, rows, size) in enumerate(calls)
        ]
        ran = await asyncio.gather(*submitted)
        await worker.close()
        return ran

    ran = asyncio.run(scenario())
    assert [one.result for one in ran] == [2 * number for number in range(len(calls))]
    for together in run.together:
        assert len({calls[number][0] for number in together}) == 1
        assert sum(calls[number][1] for number in together) <= max_rows
        assert sum(calls[number][2] for number in together) <= 100
    batched = sum(len(together) for together in run.together)
    assert sum(one.is_first for one in ran) == len(run.together) + len(calls) - batched


async def _threads(worker: Worker, calls: int, *, lasts_s: float, part: Part | None) -> list[str]:
    """In which threads calls ran, one after the other."""

    def call() -> str:
        started_s = time.thread_time()
        while time.thread_time() - started_s < lasts_s:
            pass
        return threading.current_thread().name

    return [(await worker.submit(call, deadline_s=10, part=part)).result for _ in range(calls)]


async def test_calls_that_have_been_brief_run_in_the_event_loop() -> None:
    worker = Worker("thread", 20, batching=_batching(Runs()))
    here, part = threading.current_thread().name, Part("a", 1, 1, 0)
    brief = await _threads(worker, 200, lasts_s=0, part=part)
    alone = await _threads(worker, 5, lasts_s=0, part=None)
    slow = await _threads(worker, 3, lasts_s=0.01, part=Part("slow", 1, 1, 0))
    await worker.close()

    assert brief[0] == "thread"  # nothing is known of it yet
    assert here in brief
    assert set(alone) == {"thread"}
    assert set(slow) == {"thread"}


async def test_brief_calls_wait_for_company_where_there_is_a_delay() -> None:
    worker = Worker("thread", 20, batching=_batching(Runs(), max_delay_s=0.001))
    names = await _threads(worker, 30, lasts_s=0, part=Part("a", 1, 1, 0))
    await worker.close()
    assert set(names) == {"thread"}


async def test_calls_of_unknown_cost_never_run_in_the_event_loop() -> None:
    worker = Worker("thread", 20, batching=_batching(Runs(), is_cost_known=False))
    names = await _threads(worker, 100, lasts_s=0, part=Part("a", 1, 1, 0))
    await worker.close()
    assert set(names) == {"thread"}


async def test_calls_known_to_be_brief_run_with_those_that_came_before_them_in_the_turn() -> None:
    worker = Worker("now", 20, batching=_batching(Runs()))
    earlier, now = (0, 0), list[int | None]()
    for _ in range(200):  # until batches of one and of two rows are known to be brief
        await _submit(worker, 1)
        await asyncio.gather(_submit(worker, 1), _submit(worker, 1))
        waiting = asyncio.ensure_future(_submit(worker, 5))
        await asyncio.sleep(0)  # it has been submitted then, and waits for the end of this turn
        assert worker.waiting == 1
        ran = worker.run_now([(partial(_alone, 1), Part("a", 1, 1, 1))], deadline_s=10)
        now, found = [None if own is None else own.result for own in ran], await waiting
        earlier = found.result, found.batch_rows
        if now == [2]:
            break
    await worker.close()
    assert now == [2]
    assert earlier == (10, 2)


async def test_calls_known_to_be_brief_run_at_once_and_those_that_fail_are_left() -> None:
    run = Runs(fails=True)  # so that the calls of a batch are run one by one
    worker = Worker("now", 20, batching=_batching(run))

    def now(*contents: int) -> list[int | None]:
        calls = [(partial(_alone, content), Part("a", 1, 1, content)) for content in contents]
        return [None if ran is None else ran.result for ran in worker.run_now(calls, deadline_s=10)]

    assert now(1) == [None]  # nothing is known of it yet
    for _ in range(200):
        await _submit(worker, 1)
        if now(1) == [2]:
            break
    for _ in range(200):
        await asyncio.gather(_submit(worker, 1), _submit(worker, 1), _submit(worker, 1))
        if now(1, -1, 3) == [2, None, 6]:
            break
    assert now(1, -1, 3) == [2, None, 6]
    gate, running = await _behind_a_gate(worker)
    assert now(1) == [None]  # the threads have something to do
    gate.opened.set()
    await running
    await worker.close()
    assert now(1) == [None]
