"""Folding of ONNX files: time and memory beside the onnx library's own load and save; coverage beside other tools.

Usage: python -m benchmarks.folding [--seconds S] [--megabytes M]. `ours` loads, plans, applies and writes, without
proof; the peer loads, serializes and writes with the onnx package. Memory is the largest resident size beyond that of
the process before it opened the file. The second table says, for patterns of networks, how many normalizations each
tool leaves, and whether what it wrote computes the same (largest difference over largest value).
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper, numpy_helper

from benchmarks.timing import compare
from normcore.execution import open_session, run
from normcore.folding.checkpoint import Limits, fold_file
from tests.normcore.folding.pairs import EPS, PAIRS

_CHANNELS = 512
_WRONG = 1e-4

Tool = Callable[[ModelProto], ModelProto]


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
    before = _peak_bytes()
    WORK[work](source, target)
    sys.stdout.write(str(_peak_bytes() - before))


def _peak_bytes() -> int:
    """Of this process alone: what getrusage tells begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _goal(seconds: float, megabytes: int) -> None:
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


def _ours_in_memory(model: ModelProto) -> ModelProto:
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "source.onnx", Path(name) / "target.onnx"
        onnx.save(model, source)
        ours(source, target)
        return onnx.load(target)


def _onnxruntime_basic(model: ModelProto) -> ModelProto:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "target.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(target)


def _onnxoptimizer(model: ModelProto) -> ModelProto:
    optimized: ModelProto = importlib.import_module("onnxoptimizer").optimize(model)
    return optimized


def _onnxsim(model: ModelProto) -> ModelProto:
    simplified: ModelProto = importlib.import_module("onnxsim").simplify(model)[0]
    return simplified


def tools() -> dict[str, Tool]:
    """Ours, and what is installed of the others."""
    found: dict[str, Tool] = {"ours": _ours_in_memory, "ORT basic": _onnxruntime_basic}
    for name, tool in (("onnxoptimizer", _onnxoptimizer), ("onnxsim", _onnxsim)):
        if importlib.util.find_spec(name):
            found[name] = tool
        else:
            sys.stdout.write(f"{name} is not installed: left out\n")
    return found


def _judged(model: ModelProto, tool: Tool) -> str:
    """Nodes that are left, and `wrong` where they compute something else."""
    try:
        folded = tool(model)
    except Exception as failure:  # noqa: BLE001  # another tool's failure is a result
        return type(failure).__name__
    shape = [dim.dim_value or size for dim, size in zip(_dims(model), (2, 5, 7, 9), strict=False)]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y, exact = (
        run(open_session(each.SerializeToString(), threads=1, optimization="none"), {"x": x}, ["y"], deadline_s=30)[0]
        for each in (folded, model)
    )
    error = float(np.abs(y - exact).max() / np.abs(exact).max())
    norms = sum(node.op_type == "BatchNormalization" for node in folded.graph.node)
    return f"{norms} of {len(folded.graph.node)}" + (f" WRONG {error:.0e}" if error > _WRONG else "")


def _dims(model: ModelProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(model.graph.input[0].type.tensor_type.shape.dim)


def _coverage() -> None:
    installed = tools()
    head = "".join(f"{name:>18}" for name in ("before", *installed))
    sys.stdout.write(f"{'batch norms of nodes left':<28}{head}\n")
    for name, make in PAIRS.items():
        model = onnx.shape_inference.infer_shapes(make(0, np.float32, EPS).original)
        cells = [_judged(model, tool) for tool in (lambda each: each, *installed.values())]
        sys.stdout.write(f"{name:<28}" + "".join(f"{cell:>18}" for cell in cells) + "\n")


def main(seconds: float, megabytes: int) -> None:
    _goal(seconds, megabytes)
    _coverage()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="time of the first table")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the generated network")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        _measure(options.measure[0], Path(options.measure[1]), Path(options.measure[2]))
    else:
        main(options.seconds, options.megabytes)
