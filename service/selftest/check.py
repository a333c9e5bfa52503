"""One row of the self-test."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """What was checked, where, how far it was from the truth, how far it may be, and what is wrong, if anything."""

    name: str
    device: str
    error: float
    bound: float
    seconds: float
    problem: str

    @classmethod
    def run(cls, name: str, device: str, bound: float, measure: Callable[[], float]) -> "Check":
        """Measure the error; one that is not a number, or a call that fails, is a problem as well."""
        started = time.monotonic()
        error, problem = math.nan, ""
        try:
            error = measure()
        except (ValueError, RuntimeError, OSError, LookupError) as failure:
            problem = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if not problem and not error <= bound:
            problem = "FAILED"
        return cls(name, device, error, bound, time.monotonic() - started, problem)
