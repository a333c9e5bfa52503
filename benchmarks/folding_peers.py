"""What other tools make of the networks that our tests of folding build, and whether it computes the same.

Usage: python -m benchmarks.folding_peers. The networks come from running the tests of the corpus; each tool is called
with its defaults. `folded` is a network of which fewer normalizing operators are left; it is `WRONG` where it is
further from float64, on one of the certificate's probes, than 64 times what the certificate allows. onnxoptimizer and
onnxsim are optional. The first table has a row for each test, the second for each file; then comes what is wrong.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from benchmarks.fx_networks import FxNetwork
from normcore.errors import NormcoreError
from normcore.execution import open_session, run
from normcore.folding import probes
from normcore.folding.comparison import Evaluations, compare
from normcore.folding.fold import fold_onnx
from normcore.folding.networks import Network
from tests.normcore.folding.builder import Net

Arrays = dict[str, NDArray[Any]]
Tool = Callable[[ModelProto], ModelProto]

_TESTS = Path(__file__).parent.parent / "tests" / "normcore" / "folding"
_CORPUS = (
    "onnx/test_conv.py",
    "onnx/test_conv_transpose.py",
    "onnx/test_gemm.py",
    "onnx/test_matmul.py",
    "onnx/test_batch_norm.py",
    "onnx/test_graph.py",
    "corpus",
)
# A MatMul and an Add that become one Gemm are no fold.
_NORMALIZING = frozenset({"BatchNormalization", "Mul", "Add", "Sub", "Div", "Sqrt", "ReduceMean", "ReduceL2", "Gemm"})
_KINDS = ("folded", "left", "failed", "crashed", "WRONG", "not installed")
_CLEARLY = 64.0
_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """One network of one test, named by file, test and parameters."""

    file: str
    test: str
    model: ModelProto


@dataclass(frozen=True, slots=True)
class Outcome:
    """`left`, `folded`, `WRONG`, `failed` or `crashed`; the error is of the largest value."""

    kind: str
    error: float = 0.0


class _Recorder:
    """A plugin of pytest that keeps the networks each test builds."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self._file = self._test = ""

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._file = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
        self._test = location[2].removeprefix("test_").replace("_", " ")

    def record(self, build: Callable[..., ModelProto], *operands: Any, **options: Any) -> ModelProto:
        model = build(*operands, **options)
        kept = ModelProto()
        kept.CopyFrom(model)
        self.cases.append(Case(self._file, self._test, kept))
        return model


def corpus() -> Sequence[Case]:
    recorder, build, said = _Recorder(), Net.model, io.StringIO()
    arguments = [str(_TESTS / name) for name in _CORPUS]
    with (
        mock.patch.object(Net, "model", lambda *args, **options: recorder.record(build, *args, **options)),
        contextlib.redirect_stdout(said),
    ):
        status = pytest.main([*arguments, "--no-cov", "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    if status:
        raise SystemExit(said.getvalue())
    return recorder.cases


def _ours(model: ModelProto) -> ModelProto:
    return fold_onnx(model)[0]


def _onnxruntime(model: ModelProto) -> ModelProto:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "target.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(target)


class _Elsewhere:
    """A tool in a process of its own, which it may take down."""

    def __init__(self, module: str, call: str) -> None:
        self._names = (module, call)
        self._pool = self._open()

    def __call__(self, model: ModelProto) -> ModelProto:
        try:
            content = self._pool.submit(_call, *self._names, model.SerializeToString()).result()
        except BrokenProcessPool:
            self._pool = self._open()
            raise
        changed = ModelProto()
        changed.ParseFromString(content)
        return changed

    def _open(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _call(module: str, call: str, content: bytes) -> bytes:
    answer = getattr(importlib.import_module(module), call)(ModelProto.FromString(content))
    changed = answer[0] if isinstance(answer, tuple) else answer
    return bytes(changed.SerializeToString())


class Judge:
    """The original on the certificate's probes: in its own precision and in float64."""

    def __init__(self, model: ModelProto) -> None:
        self._outputs = [info.name for info in model.graph.output]
        network, deadline = Network(model, self._outputs, threads=1), time.monotonic() + _DEADLINE_S
        inputs = probes.read_inputs(model)
        shapes = probes.find_shapes(model, partial(network.refuses, deadline=deadline), seed=0)
        self._probes = []
        for seed, kind in enumerate(probes.KINDS):
            feeds = probes.make_probe(inputs, shapes, kind=kind, seed=seed)
            native, exact = network.run(feeds, deadline=deadline), network.evaluate(feeds, deadline=deadline)
            if all(np.isfinite(array).all() for array in native.values()):
                self._probes.append((feeds, native, exact))

    def judge(self, execute: Callable[[Arrays], Arrays], *, has_folded: bool) -> Outcome:
        worst = Outcome("folded" if has_folded else "left")
        for feeds, native, exact in self._probes:
            found = execute(feeds)
            for name in self._outputs:
                seen = compare(Evaluations(native[name], found[name], exact[name], exact[name]))
                if seen.conclusive and seen.folded > max(_CLEARLY * seen.bound, worst.error * seen.scale):
                    worst = Outcome("WRONG", seen.folded / seen.scale if seen.scale else np.inf)
        return worst


def outcome(judge: Judge, model: ModelProto, tool: Tool) -> Outcome:
    try:
        changed = tool(model)
        session = open_session(changed.SerializeToString(), threads=1, optimization="none")
        names = [info.name for info in model.graph.output]
        return judge.judge(
            lambda feeds: dict(zip(names, run(session, feeds, names, deadline_s=_DEADLINE_S), strict=True)),
            has_folded=_has_folded(model, changed),
        )
    except BrokenProcessPool:
        return Outcome("crashed")
    except Exception:  # noqa: BLE001  # another tool's failure is a result
        return Outcome("failed")


def outcome_of_fx(judge: Judge, model: ModelProto) -> Outcome:
    try:
        network = FxNetwork(model)
        before = network.norms()
        network.fuse()
        return judge.judge(network.run, has_folded=network.norms() < before)
    except Exception:  # noqa: BLE001  # another tool's failure is a result
        return Outcome("failed")


def _has_folded(model: ModelProto, changed: ModelProto) -> bool:
    before, after = (Counter(node.op_type for node in each.graph.node) for each in (model, changed))
    fewer = sum(before[name] - after[name] for name in _NORMALIZING)
    return fewer > 0 or after["BatchNormalization"] < before["BatchNormalization"]


def tools() -> Mapping[str, Callable[[Judge, ModelProto], Outcome]]:
    """By the heading of its column; what is not installed answers so."""
    found: dict[str, Callable[[Judge, ModelProto], Outcome]] = {
        "ours": partial(outcome, tool=_ours),
        f"onnxruntime {onnxruntime.__version__} basic": partial(outcome, tool=_onnxruntime),
    }
    for name, call in (("onnxoptimizer", "optimize"), ("onnxsim", "simplify")):
        if importlib.util.find_spec(name):
            found[f"{name} {importlib.metadata.version(name)}"] = partial(outcome, tool=_Elsewhere(name, call))
        else:
            found[name] = lambda judge, model: Outcome("not installed")
    return found | {f"torch.fx {torch.__version__}": outcome_of_fx}


def measure() -> Iterator[tuple[Case, Mapping[str, Outcome]]]:
    """Every network that runs, and what each tool makes of it."""
    known = tools()
    for case in corpus():
        try:
            judge = Judge(case.model)
        except NormcoreError:
            continue
        yield case, {name: tool(judge, case.model) for name, tool in known.items()}


def main() -> None:
    torch.set_num_threads(1)
    rows = list(measure())
    names = list(rows[0][1])
    by_test: dict[str, list[Mapping[str, Outcome]]] = {}
    by_file: dict[str, list[Mapping[str, Outcome]]] = {}
    for case, outcomes in rows:
        by_test.setdefault(f"{case.file}: {case.test.partition('[')[0]}", []).append(outcomes)
        by_file.setdefault(case.file, []).append(outcomes)
    _print_table("networks of a test", names, by_test)
    _print_table("networks of a file", names, by_file | {"all": [outcomes for _, outcomes in rows]})
    for name in names:
        wrong = [(case.test, outcomes[name].error) for case, outcomes in rows if outcomes[name].kind == "WRONG"]
        sys.stdout.write("".join(f"{name} is wrong: {test} ({error:.0e})\n" for test, error in wrong))


def _print_table(title: str, names: Sequence[str], groups: Mapping[str, Sequence[Mapping[str, Outcome]]]) -> None:
    lines = [[title, *names], ["---"] * (len(names) + 1)]
    lines += [[heading, *(_cell(each[name] for each in found) for name in names)] for heading, found in groups.items()]
    sys.stdout.write("".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n")


def _cell(outcomes: Iterable[Outcome]) -> str:
    counts = Counter(each.kind for each in outcomes)
    return ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind])


if __name__ == "__main__":
    main()
