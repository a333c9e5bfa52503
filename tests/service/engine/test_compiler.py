"""Processes that compile kernels for the service: what they do, and what becomes of calls without them.

Each test has a process of its own: in this one other tests have loaded kernels, from a folder of their own.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

_BEGIN = """
import asyncio, logging, os, pathlib, signal, sys, threading, time
import numpy as np
from normcore import _kept_code, _sweeps
from normcore.compilation import compiled_here
from service.engine import compiler as module
from service.engine.compiler import Compiler
from service.errors import ShuttingDownError
from service.settings import Settings

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", level="WARNING")

def settings(**changes):
    return Settings(**({"compile_s": 60} | changes))

def call(dtype="f4"):
    row = np.array([1, 2, 0, 0], dtype)
    _sweeps.repeat(row, 2)
    assert row.tolist() == [1, 2, 1, 2]

async def main():
    compiler = Compiler(settings())
"""
_END = "\nasyncio.run(main())\n"


def _run(base: Path, *lines: str, begin: str = _BEGIN) -> list[str]:
    program = begin + "\n".join(f"    {line}" for line in lines) + _END
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(base)}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.splitlines()


def test_a_call_waits_for_a_process_that_compiles_and_is_excused(tmp_path: Path) -> None:
    said = _run(
        tmp_path,
        "await compiler.start()",
        "await asyncio.to_thread(call)",
        "print(compiled_here(), 0 < compiler.excuse.waited_s() < 60)",
        "waited_s = compiler.excuse.waited_s()",
        "call()",
        "print(compiler.excuse.waited_s() == waited_s)",
        "helper = compiler._helper",
        "await compiler.close()",
        "print(helper.poll())",
        "call('f8')",
        "print(compiled_here())",
    )
    assert said == ["0 True", "True", "-9", "1"]


def test_without_the_process_calls_compile_here_and_the_log_says_so(tmp_path: Path) -> None:
    said = _run(
        tmp_path,
        "await compiler.start()",
        "os.kill(compiler._helper.pid, signal.SIGKILL)",
        "await asyncio.to_thread(call)",
        "await asyncio.to_thread(call, 'f8')",
        "print(compiled_here())",
        "await compiler.close()",
    )
    assert said[0].startswith("WARNING the process that compiles kernels ended: ")
    assert said[1:] == ["2"]


def test_a_call_waits_no_longer_than_the_setting(tmp_path: Path) -> None:
    said = _run(
        tmp_path,
        "compiler = Compiler(settings(compile_s=0.01))",
        "await compiler.start()",
        "await asyncio.to_thread(call)",
        "print(compiled_here(), compiler._helper)",
        "await compiler.close()",
    )
    assert "WARNING the process that compiles kernels took longer than 0.01 s (NORMSERVE_COMPILE_S)" in said[0]
    assert said[1:] == ["1 None"]


def test_a_call_that_waits_ends_with_the_service(tmp_path: Path) -> None:
    said = _run(
        tmp_path,
        "await compiler.start()",
        "os.kill(compiler._helper.pid, signal.SIGSTOP)",
        "waiting = asyncio.create_task(asyncio.to_thread(call))",
        "while not compiler.excuse.waited_s(): await asyncio.sleep(0.01)",
        "await compiler.close()",
        "try: await waiting",
        "except ShuttingDownError: print('refused')",
        "print(compiled_here())",
    )
    assert said == ["refused", "0"]


@pytest.mark.parametrize(
    ("base", "changes", "warns"), [("/proc/nowhere", "", True), ("", "compile_s=0", False)], ids=["no folder", "off"]
)
def test_without_a_folder_or_where_it_is_switched_off_there_are_no_processes(
    tmp_path: Path, base: str, changes: str, warns: bool
) -> None:
    said = _run(
        Path(base or tmp_path),
        f"compiler = Compiler(settings({changes}))",
        "await compiler.start()",
        "await compiler.fill(is_urgent=False)",
        "print(compiler._helper, compiler._filler, compiler.has_all)",
        "call()",
        "print(compiled_here())",
        "await compiler.close()",
    )
    assert said[-2:] == ["None None False", "1"]
    assert said[:-2] == warns * [
        "WARNING no directory for compiled kernels can be written (NUMBA_CACHE_DIR): every start compiles them"
    ]


def test_a_forked_child_compiles_itself(tmp_path: Path) -> None:
    said = _run(
        tmp_path,
        "await compiler.start()",
        "child = os.fork()",
        "if not child: print(compiler.compile('normcore._sweeps', 'repeat', None), flush=True); os._exit(0)",
        "os.waitpid(child, 0)",
        "print(compiler._helper is not None)",
        "await compiler.close()",
    )
    assert said == ["False", "True"]


def test_what_fills_the_folder_waits_while_a_call_does(tmp_path: Path) -> None:
    state = "pathlib.Path(f'/proc/{compiler._filler.pid}/stat').read_text().rpartition(')')[2].split()[0]"
    said = _run(
        tmp_path,
        "await compiler.start()",
        "os.kill(compiler._helper.pid, signal.SIGSTOP)",
        "filling = asyncio.create_task(compiler.fill(is_urgent=False))",
        "await asyncio.sleep(0)",
        "waiting = asyncio.create_task(asyncio.to_thread(call))",
        f"while {state} != 'T': await asyncio.sleep(0.01)",
        "os.kill(compiler._helper.pid, signal.SIGCONT)",
        "await waiting",
        f"while {state} == 'T': await asyncio.sleep(0.01)",
        "print(os.getpriority(os.PRIO_PROCESS, compiler._filler.pid))",
        "await compiler.close()",
        "await filling",
        "print(compiler.has_all)",
    )
    assert said == ["19", "False"]


def test_a_filling_that_fails_is_a_line_in_the_log(tmp_path: Path) -> None:
    said = _run(
        tmp_path,
        "await compiler.start()",
        "compiler._memory_bytes = 2**20",
        "await compiler.fill(is_urgent=True)",
        "print(compiler.has_all)",
        "await asyncio.to_thread(call)",
        "print(compiled_here())",
        "await compiler.close()",
    )
    assert said == ["WARNING not all kernels could be compiled ahead of calls", "False", "0"]


def test_the_processes_end_with_a_killed_service(tmp_path: Path) -> None:
    said = _run(
        tmp_path,
        "await compiler.start()",
        "filling = asyncio.create_task(compiler.fill(is_urgent=False))",
        "await asyncio.to_thread(call)",
        "print(compiler._helper.pid, compiler._filler.pid, flush=True)",
        "os._exit(0)",
    )
    for pid in map(int, said[0].split()):
        until = time.monotonic() + 20
        while _is_alive(pid):
            assert time.monotonic() < until, "still there"
            time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
