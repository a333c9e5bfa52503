"""Serving beside its peers on the same machine, each in a process of its own, run in turn.

Usage: python -m benchmarks.inference [overhead goodput tensors isolation overload memory] [--rounds N] [--seconds S].
Without names, every part; `memory` takes minutes. Ratios are medians over the rounds with least and most:
times of a shared machine mean little. The load comes from `wrk` where it is installed.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import isolation, memory, overload, rivals
from benchmarks.load import Call, Load, closed_loop, connected
from benchmarks.networks import IMAGE_SHAPE, TINY_INPUTS, perceptron, residual_network
from benchmarks.rivals import Rows
from benchmarks.servers import Server, binary_call, peer, service
from normcore.compilation import keep_all
from normcore.execution import open_session
from normcore.normalization import batch_norm

_IMAGE_CONNECTIONS = 8
_TENSOR_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Side:
    """A server and the request that it is sent."""

    title: str
    server: Server
    call: Call

    def used(self, connections: int, seconds: float) -> tuple[Load, float]:
        """Its load and the CPU seconds of each request. Raises RuntimeError where it answers none."""
        before_s = self.server.cpu_s()
        load = closed_loop(self.call, connections=connections, seconds=seconds)
        if not load.rate:
            raise RuntimeError(f"{self.title}: {load.failures} answers, none of them 200")
        return load, (self.server.cpu_s() - before_s) / (load.rate * seconds)


def overhead(rounds: int, seconds: float) -> None:
    """Goal 1: the tiny network beside a hand-written FastAPI route that takes and gives raw bytes, and frameworks."""
    row = _random(1, TINY_INPUTS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = Path(folder, "tiny.onnx")
        model.write_bytes(perceptron())
        ours, fastapi = stack.enter_context(service(threads=1)), stack.enter_context(peer("fastapi", model))
        path = ours.serve("tiny", model.read_bytes())
        sides = [
            Side("normserve", ours, binary_call(ours.port, path, "x", row)),
            Side("FastAPI by hand", fastapi, Call(fastapi.port, "/infer", row.tobytes())),
            *_rivals(stack, model, row, threads=1, rows=1),
        ]
        for connections in (16, 1):
            found = [[side.used(connections, seconds) for side in sides] for _ in range(rounds)]
            for number, side in enumerate(sides):
                _say(f"  {side.title:<16}{connections:>3} connections {_table([used[number] for used in found])}")
            for number, side in enumerate(sides[1:], start=1):
                _say_ratio(f"  requests/s, ours / {side.title}", [u[0][0].rate / u[number][0].rate for u in found])
                _say_ratio(f"  CPU per request, {side.title} / ours", [u[number][1] / u[0][1] for u in found])


def goodput(rounds: int, seconds: float) -> None:
    """Goal 2: images per second through a network that keeps the processors busy."""
    image, threads = _random(1, *IMAGE_SHAPE), 2
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = Path(folder, "images.onnx")
        model.write_bytes(residual_network())
        session, images = open_session(model, threads=threads), _random(_IMAGE_CONNECTIONS, *IMAGE_SHAPE)
        ours = stack.enter_context(service(threads=threads))
        batcher = stack.enter_context(peer("batcher", model, threads=threads))
        path = ours.serve("images", model.read_bytes(), max_batch_size=_IMAGE_CONNECTIONS)
        sides = [
            Side("normserve", ours, binary_call(ours.port, path, "x", image)),
            Side("bare batcher", batcher, Call(batcher.port, "/", image.tobytes())),
            *_rivals(stack, model, image, threads=threads, rows=_IMAGE_CONNECTIONS),
        ]
        rates: list[list[float]] = []
        for _ in range(rounds):
            alone = _repeated(lambda: session.run(None, {"x": images}), seconds) * _IMAGE_CONNECTIONS
            rates.append([*(side.used(_IMAGE_CONNECTIONS, seconds)[0].rate for side in sides), alone])
    titles = [*(side.title for side in sides), "in process"]
    for number, title in enumerate(titles):
        _say(f"  {title:<16}{statistics.median(rate[number] for rate in rates):>9.1f} images/s")
    for number, title in enumerate(titles[1:], start=1):
        _say_ratio(f"  ours / {title}", [rate[0] / rate[number] for rate in rates])


def tensors(rounds: int, _: float) -> None:
    """Goal 3: batch normalization of a large tensor beside an echo of its bytes and the same computation here."""
    torch.set_num_threads(1)
    tensor = _random(_TENSOR_BYTES // 4 // 64 // 1024, 64, 32, 32)
    values = torch.from_numpy(tensor)
    times: list[tuple[float, float, float]] = []
    with service(threads=1) as ours, peer("echo") as theirs:
        path = "/v2/models/normcore.batch_norm/infer"
        calls = (
            binary_call(ours.port, path, "input", tensor, training=True),
            Call(theirs.port, "/", tensor.tobytes()),
        )
        # The first call of all loads the compiler of the kernels, which stays: some 120 MiB, whatever a tensor's size.
        asyncio.run(_answered_s(binary_call(ours.port, path, "input", tensor[:1], training=True)))
        ours_before = ours.memory_bytes()
        ours.forget_peak()
        for _round in range(rounds + 1):  # the first one warms up
            served = [asyncio.run(_answered_s(call)) for call in calls]
            started = time.perf_counter()
            with torch.inference_mode():
                batch_norm(values, training=True)
            times.append((served[0], served[1], time.perf_counter() - started))
        peak_bytes = ours.memory_bytes("VmHWM") - ours_before
    for name, side in (("normserve", 0), ("bare echo", 1), ("in process", 2)):
        _say(f"  {name:<16}{statistics.median(time[side] for time in times[1:]) * 1e3:>9.1f} ms")
    _say_ratio("  ours / (echo + in process)", [ours / (echo + alone) for ours, echo, alone in times[1:]])
    _say(f"  peak memory above that after a first small call: {peak_bytes / _TENSOR_BYTES:.2f} times the body")


_PARTS: dict[str, Callable[[int, float], None]] = {
    "overhead": overhead,
    "goodput": goodput,
    "tensors": tensors,
    "isolation": isolation.report,
    "overload": overload.report,
    "memory": memory.report,
}


def _rivals(stack: ExitStack, model: Path, row: Rows, *, threads: int, rows: int) -> Iterator[Side]:
    for rival in rivals.RIVALS:
        if rival.interpreter is None:
            name = rival.package
            _say(f"  {name}: not compared; neither installed here nor by {name.upper()}_PYTHON")
            continue
        server = stack.enter_context(rival.serving(model, threads=threads, rows=rows))
        yield Side(rival.title, server, rival.ask(server.port, row))


async def _answered_s(call: Call) -> float:
    exchange, request = await connected(call.port), call.to_bytes()
    started = time.perf_counter()
    status, _ = await exchange.ask(request)
    elapsed_s = time.perf_counter() - started
    exchange.close()
    if status != 200:
        raise RuntimeError(f"{call.path}: {status}")
    return elapsed_s


def _repeated(call: Callable[[], object], seconds: float) -> float:
    """Calls per second."""
    started, count = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - started) < seconds:
        call()
        count += 1
    return count / elapsed_s


def _random(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _table(loads: Sequence[tuple[Load, float]]) -> str:
    rate, p50, p99, cpu_s = (
        statistics.median(values)
        for values in zip(*((load.rate, load.p50_ms, load.p99_ms, cpu_s) for load, cpu_s in loads), strict=True)
    )
    return f"{rate:>9.0f} requests/s  p50 {p50:.3f} ms  p99 {p99:.2f} ms  CPU {cpu_s * 1e6:.0f} us"


def _say_ratio(name: str, ratios: Sequence[float]) -> None:
    _say(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(names: Sequence[str], rounds: int, seconds: float) -> None:
    keep_all()  # else the service has it done beside what is measured
    for name in names or _PARTS:
        part = _PARTS[name]
        _say(f"{name}: {(part.__doc__ or '').partition(chr(10))[0]}")
        part(rounds, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(_PARTS):
        parser.error(f"expected parts among {', '.join(_PARTS)}, received {', '.join(sorted(unknown))}")
    main(options.parts, options.rounds, options.seconds)
