"""Whose turn it is among the workers of one run: a test that measures time has the machine to itself."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(run: str, *, alone: bool) -> Iterator[None]:
    """Wait until no other worker of the run is in a turn of its own, or, to be alone, in any."""
    base = Path(tempfile.gettempdir()) / f"normserve-tests-{run}"
    with base.with_suffix(".gate").open("w") as gate, base.with_suffix(".room").open("w") as room:
        # Who waits to be alone holds the gate, so that the others do not keep the room by turns.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
