"""Every normalization kernel beside torch's own, in process on the CPU: time, and error against float64.

Usage: python -m benchmarks.normalization [--seconds S] [--threads N]. `ratio` is our time over torch's, the median of
pairs run in turn, with its quartiles; below 1 we are faster. Errors are max|y - float64| of the same rounded inputs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import compare
from normcore.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    lp_norm,
    rms_norm,
)

SHAPE = (32, 64, 56, 56)
LARGE_MEAN = 1e4
CHANNELS = SHAPE[1]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel: ours and torch's, both from an input to an output."""

    name: str
    ours: Callable[[Tensor], Tensor]
    torch: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = SHAPE


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """The kernels at the sizes of the goals; batch norm's parameters are float32 at least, as in mixed precision."""
    weight, bias = _exact(0.5, 1.5, CHANNELS), _exact(-1, 1, CHANNELS)
    mean, var, far = torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.full((CHANNELS,), LARGE_MEAN)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var, far = (tensor.to(wide) for tensor in (weight, bias, mean, var, far))
    row = (1024,)
    gain = _exact(0.5, 1.5, *row).to(dtype)
    own, half_bias = weight.to(dtype), bias.to(dtype)
    yield Case(
        "batch_norm training",
        lambda x: batch_norm(x, weight=weight, bias=bias, training=True).output,
        lambda x: functional.batch_norm(x, None, None, weight, bias, training=True),
    )
    yield Case(
        "batch_norm inference",
        lambda x: batch_norm(x, mean, var, weight, bias).output,
        lambda x: functional.batch_norm(x, mean, var, weight, bias),
    )
    yield Case(
        "batch_norm inference, far",  # the short form y = x * scale + shift would lose digits here
        lambda x: batch_norm(x, far, var, weight, bias).output,
        lambda x: functional.batch_norm(x, far, var, weight, bias),
    )
    yield Case(
        "instance_norm",
        lambda x: instance_norm(x, weight=own, bias=half_bias).output,
        lambda x: functional.instance_norm(x, weight=own, bias=half_bias),
    )
    yield Case(
        "group_norm 32",
        lambda x: group_norm(x, num_groups=32, weight=own, bias=half_bias).output,
        lambda x: functional.group_norm(x, 32, own, half_bias),
    )
    yield Case(
        "layer_norm",
        lambda x: layer_norm(x, normalized_shape=row, weight=gain).output,
        lambda x: functional.layer_norm(x, row, gain),
        (8192, 1024),
    )
    yield Case(
        "rms_norm",
        lambda x: rms_norm(x, normalized_shape=row, weight=gain, eps=1e-6).output,
        lambda x: functional.rms_norm(x, row, gain, 1e-6),
        (8192, 1024),
    )
    yield Case("lp_norm p=2", lambda x: lp_norm(x, p=2, axis=1).output, lambda x: functional.normalize(x, dim=1))
    if dtype in (torch.float32, torch.float64):  # torch has no half-precision kernel
        yield Case(
            "local_response_norm n=5",
            lambda x: local_response_norm(x, size=5).output,
            lambda x: functional.local_response_norm(x, 5),
        )


def main(seconds: float, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    head = f"{'kernel':<26}{'datatype':<10}{'layout':<15}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}  quartiles"
    sys.stdout.write(f"torch {torch.__version__}, {threads} threads, {SHAPE} or (8192, 1024)\n{head}")
    sys.stdout.write(f"{'':>6}error ours / torch, mean {LARGE_MEAN:g}\n")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for case in cases(dtype):
            layouts = ("contiguous", "channels_last") if len(case.shape) == 4 else ("contiguous",)
            for layout in layouts:
                sys.stdout.write(_row(case, dtype, layout, seconds) + "\n")
                sys.stdout.flush()


def _row(case: Case, dtype: torch.dtype, layout: str, seconds: float) -> str:
    values = torch.randn(case.shape)
    if layout == "channels_last":
        values = values.to(memory_format=torch.channels_last)
    timed = values.to(dtype)
    with torch.inference_mode():
        found = compare(lambda: case.ours(timed), lambda: case.torch(timed), seconds=seconds)
        shifted = (values[:4] + LARGE_MEAN).to(dtype)
        errors = [_error(kernel, case, shifted) for kernel in (case.ours, case.torch)]
    name = str(dtype).removeprefix("torch.")
    return (
        f"{case.name:<26}{name:<10}{layout:<15}{found.ours_ms:>9.2f}{found.peer_ms:>10.2f}{found.ratio:>7.2f}"
        f"  {found.low:.2f}-{found.high:.2f}{'':>6}{errors[0]:.1e} / {errors[1]:.1e}"
    )


def _exact(start: float, end: float, size: int) -> Tensor:
    """Numbers that every datatype holds exactly, so that all compute the same thing."""
    return torch.linspace(start, end, size).bfloat16().float()


def _error(kernel: Callable[[Tensor], Tensor], case: Case, values: Tensor) -> float:
    """The largest difference from torch's kernel in float64 on the same rounded, contiguous values."""
    wide = next(other for other in cases(torch.float64) if other.name == case.name)
    return float((kernel(values).double() - wide.torch(values.double().contiguous())).abs().max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    main(options.seconds, options.threads)
