"""What the processes that touch uploaded graphs may not do; where the kernel offers a limit, it is set."""

import ctypes
import os
import resource
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_OPEN_FILES = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one operation.

    Memory is limited through RLIMIT_DATA: private writable memory, whether from brk or mmap. RLIMIT_AS would also
    count mapped libraries and reserved addresses, which differ by hundreds of megabytes between builds of the same
    libraries and say nothing about the memory that is used.
    """

    memory_bytes: int
    cpu_s: int

    def apply(self) -> None:
        """For this process, for good."""
        _lower(resource.RLIMIT_DATA, self.memory_bytes)
        _lower(resource.RLIMIT_FSIZE, self.memory_bytes)  # a file is written from memory
        _lower(resource.RLIMIT_CPU, self.cpu_s)
        _lower(resource.RLIMIT_CORE, 0)
        _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)


def isolate() -> None:
    """Give up new privileges, the network, and survival when the machine runs out of memory; children inherit it.

    A network of its own needs a privilege or user namespaces; where neither is allowed, the network stays. It is one
    wall of several: the graphs run on operators that open no sockets.
    """
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # not Linux
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.unshare(_CLONE_NEWNET) != 0:
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    with suppress(AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def silence() -> None:
    """Standard streams to nowhere: what libraries print is no log of the server."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (allowed, allowed))
