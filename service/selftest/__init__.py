"""`python -m service selftest`: is what is installed here right, on every device of this host?

Every normalization is held against float64 autograd of its plain formula, and a service of its own, on a free port and
with a folder of its own, folds a network, serves it and infers.
"""

import os
import sys
import time
from collections.abc import Iterable
from typing import TextIO

import torch

from service.engine.threads import thread_budget
from service.selftest.check import Check
from service.selftest.normalizations import check_normalizations
from service.selftest.serving import check_serving

_ROW = "{:<36} {:<8} {:>10} {:>10} {:>8}  {}\n"


def selftest(stream: TextIO = sys.stdout) -> int:
    """Run every check on every device, print a table, and return 0 where all passed, else 1."""
    torch.set_num_threads(thread_budget(int(os.environ.get("NORMSERVE_THREADS", "0"))))
    started = time.monotonic()
    devices = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    stream.write(_ROW.format("check", "device", "error", "bound", "seconds", "result"))
    checks = [check for device in devices for check in _shown(check_normalizations(device), stream)]
    checks += _shown(check_serving(devices), stream)
    failed = [check.name for check in checks if check.problem]
    outcome = f"{len(failed)} FAILED: {', '.join(failed)}" if failed else "all passed"
    seconds = time.monotonic() - started
    stream.write(f"selftest: {len(checks)} checks on {', '.join(devices)} in {seconds:.1f} s, {outcome}\n")
    return 1 if failed else 0


def _shown(checks: Iterable[Check], stream: TextIO) -> list[Check]:
    found = []
    for check in checks:
        numbers = (f"{check.error:.1e}", f"{check.bound:.0e}", f"{check.seconds:.2f}")
        stream.write(_ROW.format(check.name, check.device, *numbers, check.problem or "ok"))
        stream.flush()
        found.append(check)
    return found
