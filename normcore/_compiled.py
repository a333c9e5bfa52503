"""What compiled kernels share: how they are compiled, and divide their work among threads.

This module imports numba, which takes its time: import it, and modules of kernels, where a kernel is called.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numba
import torch
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering
from torch import Tensor

from normcore._kept_code import KeptCode

Function = TypeVar("Function", bound=Callable[..., Any])

# Below so many elements a second thread costs more than it gains.
_LEAST_ELEMENTS = 2**17
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.uint16}
# Sums in any order, so that they are made in vectors; NaN and infinity stay what they are.
ANY_ORDER = frozenset({"reassoc", "nsz", "contract"})


def compiled(function: Function) -> Function:
    """Compile at the first call per datatype, without the GIL; kept on disk where a directory for it is writable."""
    return _compile(function, fastmath=False)


def inlined(function: Function) -> Function:
    """The same for steps of a kernel, made part of it: a call of arrays costs as much as a hundred values."""
    return _compile(function, fastmath=False, forceinline=True)


def compiled_sum(function: Function) -> Function:
    """`inlined` for loops that add up: the compiler chooses the order, the same one for every call."""
    return _compile(function, fastmath=set(ANY_ORDER), forceinline=True, pipeline=_Apart)


def flat(tensor: Tensor) -> Any:
    """The values of a dense tensor as a flat array in memory order, which shares its memory."""
    bits = _BITS.get(tensor.dtype)
    values = tensor.detach() if tensor.requires_grad else tensor
    values = values.resolve_neg() if values.is_neg() else values
    values = values if bits is None else values.view(bits)
    if values.is_contiguous():
        array = values.numpy()
        return array if array.ndim == 1 else array.ravel()
    return torch.as_strided(values, (values.numel(),), (1,)).numpy()


def divide(kernel: Callable[..., None], units: int, elements: int, *arguments: Any) -> None:
    """Call `kernel(*arguments, start, stop)` over all units of work, on torch's number of threads where that pays.

    What a unit computes must not depend on other units: then results do not depend on the number of threads.
    """
    threads = elements // _LEAST_ELEMENTS
    threads = min(torch.get_num_threads(), units, threads) if threads > 1 else 1
    if threads <= 1:
        kernel(*arguments, 0, units)
        return
    bounds = [units * index // threads for index in range(threads + 1)]
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(kernel, *arguments, start, stop) for start, stop in pairwise(bounds[1:])]
    try:
        kernel(*arguments, 0, bounds[1])
    finally:
        # Before the arrays go: no thread may still write into them.
        for other in others:
            other.exception()
    for other in others:
        other.result()


@cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked child has its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="normcore")


def fused(function: Function) -> Function:
    """`inlined` for loops of a * b + c, which become single instructions where the processor has them."""
    return _compile(function, fastmath={"contract"}, forceinline=True, pipeline=_Apart)


class _WideLower(Lower):
    """Asks for the widest vectors that the processor has.

    For several of Intel's the compiler prefers half the width, which is kinder to what runs between vectors; kernels
    are little but vectors, and in half precision up to a third slower that way.
    """

    def setup_function(self, described: Any) -> None:
        super().setup_function(described)  # type: ignore[no-untyped-call]  # numba has no types
        # Past its `add`, which knows attributes without a value alone.
        set.add(self.function.attributes, '"prefer-vector-width"="512"')


@register_pass(mutates_CFG=True, analysis_only=False)  # type: ignore[no-untyped-call]
class _WideLowering(NativeLowering):
    _name = "wide_lowering"

    @property
    def lowering_class(self) -> type[Lower]:
        return _WideLower


class _Wide(Compiler):
    def define_pipelines(self) -> Any:
        managers: Any = super().define_pipelines()  # type: ignore[no-untyped-call]
        for manager in managers:
            manager.passes = [
                (_WideLowering if step is NativeLowering else step, meaning) for step, meaning in manager.passes
            ]
            manager.finalize()
        return managers


class _Apart(_Wide):
    """For loops whose arrays are apart, or the same value by value: to check it takes longer than some of them.

    What has too many arrays for such checks would not become vectors.
    """

    def __init__(self, typing: Any, target: Any, library: Any, arguments: Any, returned: Any, flags: Any, own: Any):
        flags.noalias = True
        super().__init__(typing, target, library, arguments, returned, flags, own)  # type: ignore[no-untyped-call]


def _compile(
    function: Function, *, fastmath: bool | set[str], forceinline: bool = False, pipeline: Any = _Wide
) -> Function:
    compiler: Any = numba.njit
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath, "forceinline": forceinline}
    made: Any = compiler(**options, pipeline_class=pipeline)(function)
    made._cache = KeptCode(function)
    made._compile_for_args = _unseen_by_torch(made._compile_for_args)
    kernel: Function = made
    return kernel


def _unseen_by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same within what torch.compile traces: its tracer fails on some of numba's own functions."""

    def call(*arguments: Any, **named: Any) -> Any:
        tracer = sys.modules.get("torch._dynamo")
        return (function if tracer is None else tracer.disable(function))(*arguments, **named)

    return call
