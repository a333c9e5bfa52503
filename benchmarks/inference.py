"""Serving beside its peers on the same machine, each in a process of its own, run in turn.

Usage: python -m benchmarks.inference [overhead goodput tensors isolation overload memory] [--rounds N] [--seconds S].
Without names, every part but `memory`, which takes minutes. Ratios are medians over the rounds with least and most:
times of a shared machine mean little. The load comes from `wrk` where it is installed.
"""

import argparse
import asyncio
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import isolation, memory, overload
from benchmarks.load import Call, Load, closed_loop, connected
from benchmarks.networks import IMAGE_SHAPE, TINY_INPUTS, perceptron, residual_network
from benchmarks.servers import Server, binary_call, peer, service
from normcore.execution import open_session
from normcore.normalization import batch_norm

_PEERS = ("pytriton", "mlserver", "litserve")
_IMAGE_CONNECTIONS = 8
_TENSOR_BYTES = 64 * 1024**2


def overhead(rounds: int, seconds: float) -> None:
    """Goal 1: the tiny network beside a hand-written FastAPI route that takes and gives raw bytes."""
    row = _random(1, TINY_INPUTS)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "tiny.onnx")
        model.write_bytes(perceptron())
        with service(threads=1) as ours, peer("fastapi", model) as theirs:
            path = ours.serve("tiny", model.read_bytes())
            calls = (binary_call(ours.port, path, "x", row), Call(theirs.port, "/infer", row.tobytes()))
            for connections in (16, 1):
                pairs = [_used(calls, (ours, theirs), connections, seconds) for _ in range(rounds)]
                for name, side in (("normserve", 0), ("FastAPI by hand", 1)):
                    _say(f"  {name:<16}{connections:>3} connections {_table([pair[side] for pair in pairs])}")
                _say_ratio(
                    "  requests/s, ours / FastAPI", [ours.rate / theirs.rate for (ours, _), (theirs, _) in pairs]
                )
                _say_ratio("  CPU per request, FastAPI / ours", [theirs / ours for (_, ours), (_, theirs) in pairs])


def goodput(rounds: int, seconds: float) -> None:
    """Goal 2: images per second through a network that keeps the processors busy."""
    image, threads = _random(1, *IMAGE_SHAPE), 2
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "images.onnx")
        model.write_bytes(residual_network())
        session, images = open_session(model, threads=threads), _random(_IMAGE_CONNECTIONS, *IMAGE_SHAPE)
        with service(threads=threads) as ours, peer("batcher", model, threads=threads) as theirs:
            path = ours.serve("images", model.read_bytes(), max_batch_size=_IMAGE_CONNECTIONS)
            calls = binary_call(ours.port, path, "x", image), Call(theirs.port, "/", image.tobytes())
            rates: list[tuple[float, ...]] = []
            for _ in range(rounds):
                served = [closed_loop(call, connections=_IMAGE_CONNECTIONS, seconds=seconds).rate for call in calls]
                alone = _repeated(lambda: session.run(None, {"x": images}), seconds) * _IMAGE_CONNECTIONS
                rates.append((*served, alone))
    for name, side in (("normserve", 0), ("bare batcher", 1), ("in process", 2)):
        _say(f"  {name:<16}{statistics.median(rate[side] for rate in rates):>9.1f} images/s")
    _say_ratio("  ours / in process", [ours / alone for ours, _, alone in rates])
    _say_ratio("  ours / bare batcher", [ours / bare for ours, bare, _ in rates])


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


def _used(
    calls: Sequence[Call], servers: Sequence[Server], connections: int, seconds: float
) -> list[tuple[Load, float]]:
    """Load and CPU seconds per request of each side, one after the other."""
    found = []
    for call, server in zip(calls, servers, strict=True):
        before_s = server.cpu_s()
        load = closed_loop(call, connections=connections, seconds=seconds)
        found.append((load, (server.cpu_s() - before_s) / (load.rate * seconds)))
    return found


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
    for name in _PEERS:
        if importlib.util.find_spec(name) is None:
            _say(f"{name} is not installed: not compared")
    for name in names or [part for part in _PARTS if part != "memory"]:
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
