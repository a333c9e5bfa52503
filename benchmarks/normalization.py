"""Every normalization kernel beside torch's own, in process on the CPU: forward, inference and backward.

Usage: python -m benchmarks.normalization [--seconds S] [--threads 1,2] [--only TEXT]. `ratio` is our time over torch's,
the median of pairs run in turn, with its quartiles; below 1 we are faster. Backward is that of a recorded output.
Errors are max|y - float64| of the same rounded inputs, forwards only.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    warm_up,
)

IMAGES = ((32, 64, 56, 56), (32, 256, 14, 14))
ROWS = ((8192, 1024), (256, 512), (8, 16))
LARGE_MEAN = 1e4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Kernel = Callable[..., Tensor]


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


def main(seconds: float, threads: list[int], only: str) -> None:
    torch.manual_seed(0)
    warm_up()
    names = f"{'threads':<8}{'shape':<16}{'kernel':<36}{'datatype':<10}{'layout':<15}"
    head = f"{names}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}"
    sys.stdout.write(f"torch {torch.__version__}\n{head}  quartiles  error ours / torch, mean {LARGE_MEAN:g}\n")
    for count in threads:
        torch.set_num_threads(count)
        # The small sizes stay on one thread, ours and torch's.
        for shape in (*IMAGES, *ROWS) if count == 1 else (IMAGES[0], ROWS[0]):
            for dtype in DTYPES:
                for row in _rows(shape, dtype, seconds, only):
                    sys.stdout.write(f"{count:<8}{'x'.join(map(str, shape)):<16}{row}\n")
                    sys.stdout.flush()


def _rows(shape: tuple[int, ...], dtype: torch.dtype, seconds: float, only: str) -> Iterator[str]:
    layouts = ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",)
    for case in (image_cases if len(shape) == 4 else row_cases)(shape[1], dtype):
        for layout in layouts:
            values = torch.randn(shape)
            if layout == "channels_last":
                values = values.to(memory_format=torch.channels_last)
            kind = f"{str(dtype).removeprefix('torch.'):<10}{layout:<15}"
            if only in case.name:
                yield f"{case.name:<36}{kind}{_forward(case, values, dtype, seconds)}"
            if case.has_backward and only in f"{case.name} backward":
                yield f"{case.name + ' backward':<36}{kind}{_backward(case, values.to(dtype), seconds)}"


def _forward(case: Case, values: Tensor, dtype: torch.dtype, seconds: float) -> str:
    timed = values.to(dtype)
    with torch.inference_mode():
        times = _compare(
            partial(case.ours, timed, *case.parameters), partial(case.torch, timed, *case.parameters), seconds
        )
        shifted = (values[:1] + LARGE_MEAN).to(dtype)
        exact = (
            case.torch(shifted.double().contiguous(), *(term.double() for term in case.parameters))
            if ("inference" not in case.name)
            else None
        )
        if exact is None:
            return times
        errors = [
            float((kernel(shifted, *case.parameters).double() - exact).abs().max())
            for kernel in (case.ours, case.torch)
        ]
    return f"{times}  {errors[0]:.1e} / {errors[1]:.1e}"


def _backward(case: Case, values: Tensor, seconds: float) -> str:
    leaves = [tensor.clone().requires_grad_() for tensor in (values, *case.parameters)]
    grad = torch.randn_like(values)
    outputs = (kernel(*leaves) for kernel in (case.ours, case.torch))
    ours, peer = (partial(torch.autograd.grad, output, leaves, grad, retain_graph=True) for output in outputs)
    return _compare(ours, peer, seconds)


def _compare(ours: Callable[[], Any], peer: Callable[[], Any], seconds: float) -> str:
    found = compare(ours, peer, seconds=seconds)
    return f"{found.ours_ms:>9.3f}{found.peer_ms:>10.3f}{found.ratio:>7.2f}  {found.low:.2f}-{found.high:.2f}"


def _exact(start: float, end: float, size: int) -> Tensor:
    """Numbers that every datatype holds exactly, so that all compute the same thing."""
    return torch.linspace(start, end, size).bfloat16().float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="time per row")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, such as 1,2")
    parser.add_argument("--only", default="", help="part of the names of kernels")
    options = parser.parse_args()
    main(options.seconds, [int(count) for count in options.threads.split(",")], options.only)
