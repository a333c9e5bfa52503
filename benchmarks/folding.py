"""Folding of ONNX files: time and memory beside the onnx library's own load and save.

Usage: python -m benchmarks.folding [--seconds S] [--megabytes M]. `ours` loads, plans, applies and writes, without
proof; the peer loads, serializes and writes with the onnx package. Memory is the largest resident size beyond that of
the process before it opened the file.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from benchmarks.timing import compare
from normcore.folding.checkpoint import Limits, fold_file

_CHANNELS = 512


def generated(megabytes: int) -> ModelProto:
    """Convolutions of 9.4 MB, each followed by a batch norm and Relu."""
    generator = np.random.default_rng(0)
    weights, nodes, name = {}, [], "x"
    for index in range(max(1, round(megabytes / 9.44))):
        weights[f"w{index}"] = generator.standard_normal((_CHANNELS, _CHANNELS, 3, 3), np.float32) / 68
        weights |= {f"{role}{index}": generator.uniform(0.5, 2, _CHANNELS).astype(np.float32) for role in "gbmv"}
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [f"c{index}"], pads=[1] * 4))
        parameters = [f"{role}{index}" for role in "gbmv"]
        nodes.append(helper.make_node("BatchNormalization", [f"c{index}", *parameters], [f"n{index}"]))
        name = f"r{index}"
        nodes.append(helper.make_node("Relu", [f"n{index}"], [name]))
    shape: list[str | int | None] = ["n", _CHANNELS, "h", "w"]
    values = [helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, shape) for each in ("x", name)]
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    graph = helper.make_graph(nodes, "network", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def ours(source: Path, target: Path) -> None:
    fold_file(source, target, limits=Limits(), verify=None)


def peer(source: Path, target: Path) -> None:
    onnx.save(onnx.load(source), target)


WORK: Mapping[str, Callable[[Path, Path], None]] = {"ours": ours, "peer": peer}


def largest_growth_bytes(work: str, source: Path, target: Path) -> int:
    """Of the resident size, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.folding", "--measure", work, str(source), str(target)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(work: str, source: Path, target: Path) -> None:
    before = peak_bytes()
    WORK[work](source, target)
    sys.stdout.write(str(peak_bytes() - before))


def peak_bytes() -> int:
    """Of this process alone: what getrusage tells begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(seconds: float, megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "source.onnx", Path(name) / "target.onnx"
        onnx.save(generated(megabytes), source)
        size = source.stat().st_size
        found = compare(lambda: ours(source, target), lambda: peer(source, target), seconds=seconds)
        growth = {work: largest_growth_bytes(work, source, target) / size for work in WORK}
    sys.stdout.write(
        f"{size / 1e6:.0f} MB: ours {found.ours_ms:.0f} ms, onnx load and save {found.peer_ms:.0f} ms, ratio "
        f"{found.ratio:.2f} ({found.low:.2f}-{found.high:.2f}, goal 1.5); peak memory {growth['ours']:.2f} x the file "
        f"(goal 4.6), onnx {growth['peer']:.2f} x\n\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="time of the measurement")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the generated network")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        _measure(options.measure[0], Path(options.measure[1]), Path(options.measure[2]))
    else:
        main(options.seconds, options.megabytes)
