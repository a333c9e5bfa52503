"""Operations that misbehave, for tests of the sandbox: no heavy import, so their process starts at once."""

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from normcore.errors import CheckpointError, ShapeError
from service.engine.zygote import Operation, Report

Result = dict[str, Any]


class UnknownGraphError(CheckpointError):
    """A class the server does not know; it knows its base."""


def echo(arguments: Mapping[str, Any], report: Report) -> Result:
    report("echo", 1, 2)
    report("echo", 2, 2)
    return dict(arguments)


def surroundings(_: Mapping[str, Any], __: Report) -> Result:
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in ("DATA", "CPU", "CORE")}
    status = Path("/proc/self/status").read_text()
    return {
        "environment": dict(os.environ),
        "limits": limits,
        "interfaces": [name for _, name in socket.if_nameindex()],
        "oom_score": int(Path("/proc/self/oom_score_adj").read_text()),
        "no_new_privileges": "NoNewPrivs:\t1" in status,
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


def ancestors(_: Mapping[str, Any], __: Report) -> Result:
    keeper = os.getppid()
    return {"keeper": keeper, "zygote": Path(f"/proc/{keeper}/stat").read_text().rpartition(")")[2].split()[1]}


def fail(arguments: Mapping[str, Any], _: Report) -> Result:
    errors: dict[str, Callable[[], Exception]] = {
        "shape": lambda: ShapeError("weight", expected="4 elements", received="5"),
        "unknown": lambda: UnknownGraphError("no such graph"),
        "defect": lambda: KeyError("a defect"),
        "disk": lambda: OSError(errno.ENOSPC, "disk full"),
        "memory": MemoryError,
    }
    raise errors[arguments["error"]]()


def allocate(arguments: Mapping[str, Any], _: Report) -> Result:
    return {"bytes": len(bytes(arguments["bytes"]))}


def say(arguments: Mapping[str, Any], _: Report) -> Result:
    return {"text": "x" * arguments["bytes"]}


def babble(_: Mapping[str, Any], __: Report) -> Result:
    return {"no JSON": object()}


def die(arguments: Mapping[str, Any], _: Report) -> Result:
    os.kill(os.getpid(), signal.Signals[arguments["signal"]])
    return {}


def leave(arguments: Mapping[str, Any], _: Report) -> Result:
    os.write(1, b"noise")
    os.write(2, b"noise")
    os._exit(arguments["status"])


def spin(_: Mapping[str, Any], __: Report) -> Result:
    while True:
        pass


def sleep(arguments: Mapping[str, Any], report: Report) -> Result:
    report(str(os.getpid()), 0, 1)
    time.sleep(arguments["seconds"])
    return {}


OPERATIONS: Mapping[str, Operation] = {
    operation.__name__: operation
    for operation in (echo, surroundings, ancestors, fail, allocate, say, babble, die, leave, spin, sleep)
}
