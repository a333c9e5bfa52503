"""Compilation of kernels ahead of their calls, by other processes than those that call them.

`python -m normcore.compilation` compiles all of them for this machine's processor and keeps their code, as an
installation may. That takes some three minutes of one core, or its part of them on each of several; once for each
release and kind of processor.
"""

import fcntl
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from normcore import normalization, statistics
from normcore._kept_code import KeptCode, compiled_elsewhere, folder, has_all, mark_all
from normcore.normalization.warm_up import COMPUTED

__all__ = ["compile_kernel", "compiled_elsewhere", "compiled_here", "has_folder", "is_all_kept", "keep_all", "load_all"]


def has_folder() -> bool:
    """Whether there is a directory to keep code in."""
    return folder() is not None


def is_all_kept() -> bool:
    """Whether the code of all kernels is kept for this processor."""
    kept = folder()
    return kept is not None and has_all(kept)


def keep_all(processes: int = 1) -> bool:
    """Compile what is not kept yet, and say whether all is kept; who does the same in another process is waited for.

    Several `processes` divide the work, each of them started anew.
    """
    kept = folder()
    if kept is None:
        return False
    if not has_all(kept):
        with _alone(kept):
            if processes > 1 and not has_all(kept):
                _divide(min(processes, len(_PARTS)))
            load_all()
            return mark_all(kept)
    return True


def load_all() -> None:
    """Have all kernels ready in this process: load what is kept, and compile the rest."""
    for load in _PARTS:
        load()


def compile_kernel(module: str, name: str, types: Any) -> None:
    """Compile a kernel for these types of arguments, if it is not kept, and keep it."""
    getattr(importlib.import_module(module), name).compile(types)


def compiled_here() -> int:
    """Kernels that this process has compiled itself."""
    return KeptCode.compiled_here


def _load_decimals() -> None:
    from normcore.decimals import read_decimals  # and numba with it, which takes its time

    read_decimals(b"0")


_PARTS: tuple[Callable[[], None], ...] = (
    *(partial(normalization.warm_up, (dtype,)) for dtype in COMPUTED),
    statistics.warm_up,
    _load_decimals,
)


def _divide(processes: int) -> None:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for done in [pool.submit(load) for load in _PARTS]:
            done.result()


@contextmanager
def _alone(kept: Path) -> Iterator[None]:
    with (kept / "filling.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _main() -> int:
    is_kept = keep_all(len(os.sched_getaffinity(0)))
    sys.stdout.write(f"{folder()}\n" if is_kept else "no directory can be written: set NUMBA_CACHE_DIR\n")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(_main())
