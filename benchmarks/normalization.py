"""Every normalization kernel beside torch's own, in process on the CPU: forward, inference and backward.

Usage: python -m benchmarks.normalization [--seconds S] [--threads 1,2] [--only TEXT] [--all]. `ratio` is our time over
torch's, the median of pairs run in turn, with its quartiles; below 1 we are faster. On one thread time is what that
thread has computed, with several it is the wall's, which other work on the machine disturbs. Backward is that of a
recorded output. The memory of outputs is kept from call to call, as by a caller who hands it in: fresh pages take the
system longer than most kernels run, on both sides. Errors are max|y - float64| of the same rounded inputs, forwards
only. Last comes how many rows miss the goal; of less than a million values, what is timed is the way to the kernel,
which in Python takes 15 to 50 microseconds.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import Comparison, compare
from normcore.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    lp_norm,
    rms_norm,
    warm_up,
)

IMAGES = ((32, 64, 56, 56), (32, 256, 14, 14))
ROWS = ((8192, 1024), (256, 512), (8, 16))
LARGE_MEAN = 1e4
# No row slower than torch by more than a tenth, but for inference, where the exact mean has its price.
GOAL, INFERENCE_GOAL = 1.10, 2.2
MANY = 10**6
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Without --all: float64 is rarely normalized, and these kernels are not of the standardize family.
USUAL_DTYPES = DTYPES[:3]
UNUSUAL = ("far", "lp_norm", "local_response_norm")
Kernel = Callable[..., Tensor]
# Of glibc's mallopt: freed memory is not given back, and large blocks are taken from it too.
TRIM_THRESHOLD, MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 2**30


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel: ours and torch's, both from an input and parameters that have gradients to an output."""

    name: str
    ours: Kernel
    torch: Kernel
    parameters: tuple[Tensor, ...] = ()
    has_backward: bool = True


def image_cases(channels: int, dtype: torch.dtype) -> Iterator[Case]:
    """Norms of images; batch norm's parameters are float32 at least, as in mixed precision."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = _exact(0.5, 1.5, channels).to(wide), _exact(-1, 1, channels).to(wide)
    mean, var = torch.zeros(channels, dtype=wide), torch.ones(channels, dtype=wide)
    far = torch.full_like(mean, LARGE_MEAN)
    affine, own = (weight, bias), (weight.to(dtype), bias.to(dtype))
    yield Case(
        "batch_norm training",
        lambda x, w, b: batch_norm(x, weight=w, bias=b, training=True).output,
        lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True),
        affine,
    )
    for name, given in (("batch_norm inference", mean), ("batch_norm inference, far", far)):
        yield Case(
            name,
            lambda x, w, b, given=given: batch_norm(x, given, var, w, b).output,
            lambda x, w, b, given=given: functional.batch_norm(x, given, var, w, b),
            affine,
            has_backward=given is mean,
        )
    yield Case(
        "instance_norm",
        lambda x, w, b: instance_norm(x, weight=w, bias=b).output,
        lambda x, w, b: functional.instance_norm(x, weight=w, bias=b),
        own,
    )
    yield Case(
        "group_norm 32",
        lambda x, w, b: group_norm(x, w, b, num_groups=32).output,
        lambda x, w, b: functional.group_norm(x, 32, w, b),
        own,
    )
    yield Case("lp_norm p=2", lambda x: lp_norm(x, p=2, axis=1).output, lambda x: functional.normalize(x, dim=1))
    if dtype in (torch.float32, torch.float64):  # torch has no half-precision kernel
        yield Case(
            "local_response_norm n=5",
            lambda x: local_response_norm(x, size=5).output,
            lambda x: functional.local_response_norm(x, 5),
        )


def row_cases(size: int, dtype: torch.dtype) -> Iterator[Case]:
    weight, bias = _exact(0.5, 1.5, size).to(dtype), _exact(-1, 1, size).to(dtype)
    yield Case(
        "layer_norm",
        lambda x, w, b: layer_norm(x, w, b).output,
        lambda x, w, b: functional.layer_norm(x, (size,), w, b),
        (weight, bias),
    )
    yield Case(
        "rms_norm",
        lambda x, w: rms_norm(x, w, eps=1e-6).output,
        lambda x, w: functional.rms_norm(x, (size,), w, 1e-6),
        (weight,),
    )
    if size <= 512:
        yield from (
            case for case in image_cases(size, dtype) if case.name in ("batch_norm training", "batch_norm inference")
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured: rows of the table, and which miss the goal, of many values and of few."""

    seconds: float
    only: str
    is_all: bool
    misses: dict[bool, list[bool]] = field(default_factory=lambda: {True: [], False: []})

    def rows(self, shape: tuple[int, ...], *, threads: int) -> Iterator[str]:
        torch.set_num_threads(threads)
        values = torch.randn(shape)
        head = f"{f'{threads} ' + ('cpu' if threads == 1 else 'wall'):<8}{'x'.join(map(str, shape)):<16}"
        for dtype in DTYPES if self.is_all else USUAL_DTYPES:
            cases = (image_cases if len(shape) == 4 else row_cases)(shape[1], dtype)
            for case in cases:
                if self.is_all or not any(part in case.name for part in UNUSUAL):
                    for row in self._layouts(case, values, dtype, threads):
                        yield f"{head}{row}"

    def _layouts(self, case: Case, values: Tensor, dtype: torch.dtype, threads: int) -> Iterator[str]:
        formats = {"contiguous": torch.contiguous_format}
        if values.ndim == 4:
            formats["channels_last"] = torch.channels_last
        for layout, memory_format in formats.items():
            timed = values.to(dtype).contiguous(memory_format=memory_format)
            kind = f"{str(dtype).removeprefix('torch.'):<10}{layout:<15}"
            if self.only in case.name:
                goal = INFERENCE_GOAL if "inference" in case.name else GOAL
                times = self._listed(_forward(case, timed, self.seconds, threads), timed, goal)
                yield f"{case.name:<36}{kind}{times}  {_errors(case, values, dtype, memory_format)}"
            if case.has_backward and self.only in f"{case.name} backward":
                times = self._listed(_backward(case, timed, self.seconds, threads), timed, GOAL)
                yield f"{case.name + ' backward':<36}{kind}{times}"

    def _listed(self, found: Comparison, values: Tensor, goal: float) -> str:
        self.misses[values.numel() >= MANY].append(found.ratio > goal)
        return f"{found.ours_ms:>9.3f}{found.peer_ms:>10.3f}{found.ratio:>7.2f}  {found.low:.2f}-{found.high:.2f}"


def keep_memory() -> bool:
    """Have freed memory kept for the next call; whether the allocator does."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, KEPT_BYTES) for name in (TRIM_THRESHOLD, MMAP_THRESHOLD))


def main(bench: Bench, threads: list[int]) -> None:
    torch.manual_seed(0)
    memory = "kept" if keep_memory() else "given back to the system where the allocator likes"
    warm_up()
    names = f"{'threads':<8}{'shape':<16}{'kernel':<36}{'datatype':<10}{'layout':<15}"
    head = f"{names}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}"
    sys.stdout.write(f"torch {torch.__version__}, freed memory is {memory}\n")
    sys.stdout.write(f"{head}  quartiles  error ours / torch, mean {LARGE_MEAN:g}\n")
    for count in threads:
        # The small sizes stay on one thread, ours and torch's.
        for shape in (*IMAGES, *ROWS) if count == 1 else (IMAGES[0], ROWS[0]):
            for row in bench.rows(shape, threads=count):
                sys.stdout.write(f"{row}\n")
                sys.stdout.flush()
    for is_many, misses in bench.misses.items():
        size = "a million values or more" if is_many else "fewer values"
        goal = f"{GOAL:.2f} times torch's time, {INFERENCE_GOAL} in inference"
        sys.stdout.write(f"{sum(misses)} of {len(misses)} rows of {size} above {goal}\n")


@torch.inference_mode()
def _forward(case: Case, values: Tensor, seconds: float, threads: int) -> Comparison:
    ours, peer = (partial(kernel, values, *case.parameters) for kernel in (case.ours, case.torch))
    return compare(ours, peer, seconds=seconds, is_single=threads == 1)


@torch.inference_mode()
def _errors(case: Case, values: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> str:
    if "inference" in case.name:
        return ""
    shifted = (values[:8] + LARGE_MEAN).to(dtype).contiguous(memory_format=memory_format)
    exact = case.torch(shifted.double().contiguous(), *(term.double() for term in case.parameters))
    found = (kernel(shifted, *case.parameters).double() for kernel in (case.ours, case.torch))
    return " / ".join(f"{float((output - exact).abs().max()):.1e}" for output in found)


def _backward(case: Case, values: Tensor, seconds: float, threads: int) -> Comparison:
    leaves = [tensor.clone().requires_grad_() for tensor in (values, *case.parameters)]
    grad = torch.randn_like(values)
    outputs = (kernel(*leaves) for kernel in (case.ours, case.torch))
    ours, peer = (partial(torch.autograd.grad, output, leaves, grad, retain_graph=True) for output in outputs)
    return compare(ours, peer, seconds=seconds, is_single=threads == 1)


def _exact(start: float, end: float, size: int) -> Tensor:
    """Numbers that every datatype holds exactly, so that all compute the same thing."""
    return torch.linspace(start, end, size).bfloat16().float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.03, help="time per row")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, such as 1,2")
    parser.add_argument("--only", default="", help="part of the names of kernels")
    parser.add_argument("--all", action="store_true", help="every datatype and kernel")
    options = parser.parse_args()
    main(Bench(options.seconds, options.only, options.all), [int(count) for count in options.threads.split(",")])
