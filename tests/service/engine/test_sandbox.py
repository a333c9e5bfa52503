"""The sandbox with real children. Fake operations stand in for the heavy ones, which test_operations.py runs."""

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from normcore.errors import CheckpointError, NormcoreError, ShapeError
from service.engine.sandbox import Sandbox
from service.errors import OverloadedError, ShuttingDownError, StorageFullError

OPERATIONS = "tests.service.engine.fake_operations"
MEMORY_BYTES = 512 * 1024 * 1024


def _sandbox(*, deadline_s: float = 20.0, slots: int = 1, queue: int = 1, operations: str = OPERATIONS) -> Sandbox:
    return Sandbox(memory_bytes=MEMORY_BYTES, deadline_s=deadline_s, slots=slots, queue=queue, operations=operations)


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    sandbox = _sandbox()
    await sandbox.start()
    yield sandbox
    await sandbox.close()


class Started:
    """Progress that tells the child's process id, and that it runs."""

    def __init__(self) -> None:
        self.pid = 0
        self.event = asyncio.Event()

    def __call__(self, step: str, _done: int, _total: int) -> None:
        self.pid = int(step)
        self.event.set()


async def _sleeping(sandbox: Sandbox, seconds: float = 60) -> tuple[asyncio.Task[dict[str, Any]], Started]:
    started = Started()
    running = asyncio.create_task(sandbox.run("sleep", {"seconds": seconds}, progress=started))
    await asyncio.wait_for(started.event.wait(), 10)
    return running, started


def _runs(pid: int) -> bool:
    """A process that ended may stay listed until its parent, by then init, asks for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def _eventually(holds: Callable[[], bool]) -> bool:
    for _ in range(200):
        if holds():
            return True
        await asyncio.sleep(0.02)
    return False


def _may_leave_the_network() -> bool:
    tool = shutil.which("unshare")
    if tool is None:
        return False
    return any(subprocess.run([tool, flags, "true"], check=False).returncode == 0 for flags in ("-n", "-rn"))


async def test_run_returns_the_result_and_reports_progress(sandbox: Sandbox) -> None:
    seen: list[tuple[str, int, int]] = []

    result = await sandbox.run("echo", {"numbers": [1, 2.5, None]}, progress=lambda *step: seen.append(step))

    assert result == {"numbers": [1, 2.5, None]}
    assert seen == [("echo", 1, 2), ("echo", 2, 2)]


def test_run_works_on_the_servers_event_loop() -> None:
    async def run() -> dict[str, Any]:
        sandbox = _sandbox(deadline_s=0.5)
        try:
            with pytest.raises(CheckpointError, match="SANDBOX_DEADLINE_S"):
                await sandbox.run("spin", {})
            return await sandbox.run("say", {"bytes": 3_000_000})
        finally:
            await sandbox.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert len(runner.run(run())["text"]) == 3_000_000


async def test_child_has_limits_and_nothing_of_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NORMSERVE_SECRET", "hidden")
    sandbox = _sandbox()
    with (tmp_path / "open").open("w"):
        found = await sandbox.run("surroundings", {})
    await sandbox.close()

    assert found["limits"]["DATA"] == MEMORY_BYTES
    assert found["limits"]["CORE"] == 0
    assert found["limits"]["CPU"] == 20 * len(os.sched_getaffinity(0))
    assert found["no_new_privileges"]
    assert "NORMSERVE_SECRET" not in found["environment"]
    assert found["files"] <= 7
    assert found["oom_score"] == 1000
    assert found["interfaces"] == ["lo"] or not _may_leave_the_network()


@pytest.mark.parametrize(
    ("error", "expected", "match"),
    [
        ("shape", ShapeError, "^weight: expected 4 elements, received 5$"),
        ("unknown", CheckpointError, "^no such graph$"),
        ("defect", RuntimeError, "KeyError: 'a defect'"),
        ("disk", StorageFullError, "no room"),
        ("memory", CheckpointError, "536870912 bytes of memory .*NORMSERVE_SANDBOX_MEMORY_BYTES"),
    ],
)
async def test_errors_come_out_as_themselves(
    sandbox: Sandbox, error: str, expected: type[Exception], match: str
) -> None:
    with pytest.raises(expected, match=match) as caught:
        await sandbox.run("fail", {"error": error})
    assert type(caught.value) is expected
    if isinstance(caught.value, ShapeError):
        assert (caught.value.argument, caught.value.expected) == ("weight", "4 elements")


@pytest.mark.parametrize(
    ("operation", "arguments", "expected", "match"),
    [
        pytest.param("allocate", {"bytes": 2**31}, CheckpointError, "needs more than 536870912 bytes", id="memory"),
        pytest.param("die", {"signal": "SIGSEGV"}, CheckpointError, "SIGSEGV", id="crash"),
        pytest.param("die", {"signal": "SIGKILL"}, CheckpointError, "SANDBOX_MEMORY_BYTES", id="killed"),
        pytest.param("die", {"signal": "SIGXCPU"}, CheckpointError, "CPU time .*SANDBOX_DEADLINE_S", id="CPU limit"),
        pytest.param("leave", {"status": 3}, RuntimeError, "status 3 and without a reply", id="exit"),
        pytest.param("babble", {}, RuntimeError, "not JSON serializable", id="no JSON"),
        pytest.param("say", {"bytes": 65 * 2**20}, CheckpointError, "over 67108864 bytes", id="endless reply"),
    ],
)
async def test_child_that_does_not_answer_is_explained(
    sandbox: Sandbox, operation: str, arguments: dict[str, Any], expected: type[Exception], match: str
) -> None:
    with pytest.raises(expected, match=match):
        await sandbox.run(operation, arguments)
    assert await sandbox.run("echo", {"still": "there"}) == {"still": "there"}


async def test_allocation_within_the_limit_passes(sandbox: Sandbox) -> None:
    assert await sandbox.run("allocate", {"bytes": 2**26}) == {"bytes": 2**26}


async def test_deadline_kills_the_child() -> None:
    sandbox = _sandbox(deadline_s=0.4)
    await sandbox.start()
    running, started = await _sleeping(sandbox)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"longer than 0\.4 s \(NORMSERVE_SANDBOX_DEADLINE_S\)"):
        await running
    assert time.monotonic() - began < 5
    assert await _eventually(lambda: not _runs(started.pid))
    await sandbox.close()


async def test_cancelled_caller_kills_its_child_and_frees_its_slot(sandbox: Sandbox) -> None:
    running, started = await _sleeping(sandbox)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not _runs(started.pid)
    assert await sandbox.run("echo", {}) == {}


async def test_full_queue_refuses_at_once(sandbox: Sandbox) -> None:
    running, _ = await _sleeping(sandbox)
    waiting = asyncio.create_task(sandbox.run("echo", {"waited": True}))
    await asyncio.sleep(0)

    with pytest.raises(OverloadedError, match="2 operations on checkpoints"):
        await sandbox.run("echo", {})

    running.cancel()
    assert await waiting == {"waited": True}


async def test_slots_run_at_once() -> None:
    sandbox = _sandbox(slots=2, queue=0)
    await sandbox.start()
    first, _ = await _sleeping(sandbox)
    assert await sandbox.run("echo", {}) == {}
    first.cancel()
    await sandbox.close()


async def test_zygote_that_was_killed_is_started_again(sandbox: Sandbox) -> None:
    zygote = int((await sandbox.run("ancestors", {}))["zygote"])
    os.kill(zygote, signal.SIGKILL)
    assert await _eventually(lambda: not _runs(zygote))

    assert await sandbox.run("echo", {"again": True}) == {"again": True}


async def test_zygote_that_dies_takes_its_children_along(sandbox: Sandbox) -> None:
    zygote = int((await sandbox.run("ancestors", {}))["zygote"])
    running, started = await _sleeping(sandbox)
    os.kill(zygote, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="without a reply"):
        await running
    assert await _eventually(lambda: not _runs(started.pid))


async def test_close_kills_what_runs_and_refuses_what_waits(sandbox: Sandbox) -> None:
    running, started = await _sleeping(sandbox)
    waiting = asyncio.create_task(sandbox.run("echo", {}))
    await asyncio.sleep(0)
    await sandbox.close()

    for task in (running, waiting):
        with pytest.raises(ShuttingDownError):
            await task
    with pytest.raises(ShuttingDownError):
        await sandbox.run("echo", {})
    assert await _eventually(lambda: not _runs(started.pid))


async def test_operations_that_cannot_be_imported_say_why() -> None:
    sandbox = _sandbox(operations="tests.service.engine.no_such_module")
    with pytest.raises(RuntimeError, match=r"No module named .tests\.service\.engine\.no_such_module"):
        await sandbox.start()
    await sandbox.close()


def test_every_error_of_the_library_can_come_out() -> None:
    from service.engine.sandbox import _ERRORS

    public = [error for error in NormcoreError.__subclasses__() if error.__module__ == "normcore.errors"]
    assert {error.__name__ for error in public} <= set(_ERRORS)
