"""`python -m normcore`: what it prints, writes and returns."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from normcore.__main__ import main
from tests.service import hostile


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    path.write_bytes(hostile.small_conv())
    return path


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "in.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).state_dict(), path)
    return path


def test_a_graph_is_folded_with_a_report(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, report = graph.with_name("out.onnx"), graph.with_name("r.json")
    assert main(["fold", str(graph), str(target), "--report", str(report), "--probes", "5"]) == 0
    out, err = capsys.readouterr()
    assert out == "equivalent: 1 of 1 normalizations folded\n"
    assert "computes the same function" in err
    content = json.loads(report.read_text())
    assert content["certificate"]["verdict"] == "equivalent"
    assert [node.op_type for node in onnx.load(target).graph.node] == ["Conv"]
    assert main(["fold", str(target), str(graph.with_name("again.onnx"))]) == 0
    assert capsys.readouterr().out == "unchanged: 0 of 0 normalizations folded\n"


def test_compare_tells_equivalent_from_different(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = graph.with_name("out.onnx")
    assert main(["fold", str(graph), str(target), "--no-verify"]) == 4
    assert main(["compare", str(graph), str(target)]) == 0
    model = onnx.load(target)
    weight = numpy_helper.to_array(model.graph.initializer[0]) * 1.01
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, target)
    certificate = graph.with_name("c.json")
    assert main(["compare", str(graph), str(target), "--report", str(certificate)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("different: The folded network computes another")
    assert json.loads(certificate.read_text())["verdict"] == "different"
    assert main(["compare", str(graph), str(target), "--deadline-s", "0"]) == 3


def test_named_tensors_fold_by_the_pairs_of_the_caller(tensors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tensors.with_name("out.safetensors")
    assert main(["plan", str(tensors)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert "what would settle it: an ONNX export" in first
    assert last == "0 of 1 normalizations would fold"
    options = ["--eps", "1e-5", "--pairs", "1=0", "--form", "shape_preserving"]
    assert main(["plan", str(tensors), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["normalizations"][0]["status"] == "foldable"
    assert main(["fold", str(tensors), str(target), *options]) == 4
    assert capsys.readouterr().out == "unproven: 1 of 1 normalizations folded\n"
    assert target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fold", "nothing.onnx", "out"], "No such file"),
        (["fold", "in.onnx", "out", "--eps", "1e-5"], "eps: expected for another kind"),
        (["plan", "in.onnx", "--max-nodes", "1"], "1"),
        (["plan", "broken"], "no known format"),
        (["compare", "in.onnx", "broken"], "no known format"),
        (["fold", "in.onnx", "no/such/folder/out"], "No such file"),
    ],
    ids=["missing", "option", "limit", "format", "other", "folder"],
)
def test_refusals_are_one_sentence(
    graph: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(graph.parent)
    Path("broken").write_bytes(b"\xff" * 100)
    assert main(arguments) == 5
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["fold"], ["plan", "x", "--pairs", "y"], ["fold", "a", "b", "--probes", "3"]]
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_it_runs_as_a_module(graph: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "normcore", "plan", str(graph)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("foldable  norm: into conv\n")
