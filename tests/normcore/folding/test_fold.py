import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from normcore.checkpoints.onnx import GraphLimits, load_onnx
from normcore.errors import CheckpointError
from normcore.folding.fold import fold_checkpoint, fold_onnx
from normcore.folding.onnx.conv_transpose import ConvTransposeRule
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.rounding import Stored
from normcore.folding.onnx.sinks import SINKS
from normcore.folding.plan import plan_onnx
from normcore.folding.verify import ProbeOptions
from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators, refusal

LIMITS = GraphLimits()
VERIFY = ProbeOptions(count=4, deadline_s=60)


def two_layers() -> ModelProto:
    """Conv -> norm -> Relu -> ConvTranspose -> norm -> Conv -> norm."""
    net = Net()
    first = net.norm(net.op("Conv", "x", net.weight(6, 3, 3, 3)), 6, output="first")
    second = net.norm(net.op("ConvTranspose", net.op("Relu", first), net.weight(6, 4, 3, 3)), 4, output="second")
    third = net.norm(net.op("Conv", second, net.weight(5, 4, 3, 3)), 5, output="third")
    return net.model({"x": ("N", 3, 9, 8)}, third)


def write(model: ModelProto, folder: Path) -> Path:
    path = folder / "source.onnx"
    onnx.save(model, path)
    return path


def test_folds_chain_of_norms() -> None:
    net = Net()
    name = net.op("Conv", "x", net.weight(4, 3, 3))
    for _ in range(3):
        name = net.norm(name, 4)
    model = net.model({"x": (2, 3, 9)}, name)
    assert plan_onnx(model).foldable == 3
    folded, entries = fold_and_compare(model, x=noise(2, 3, 9))
    assert operators(folded) == ["Conv"]
    assert [entry.output for entry in entries][-1] == name


def test_keeps_rest_of_chain_after_exclusion() -> None:
    net = Net()
    first = net.norm(net.op("Conv", "x", net.weight(4, 3, 3)), 4)
    model = net.model({"x": (2, 3, 9)}, net.norm(first, 4))
    folded, entries = fold_onnx(model, exclude=[first])
    assert folded == model
    assert [entry.reason for entry in entries] == [
        "excluded by the caller",
        "BatchNormalization 'batchnormalization_1' is excluded by the caller; "
        f"forward: {entries[1].output!r} is an output of the graph",
    ]


def test_plan_is_pure_and_promises_nothing_measured() -> None:
    model = two_layers()
    before = model.SerializeToString()
    plan = plan_onnx(model)
    assert model.SerializeToString() == before
    assert plan.foldable == 3
    assert {(entry.status, entry.residual) for entry in plan.entries} == {("foldable", None)}


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        ("Relu", "its input is produced by Relu 'relu_1', which is not linear"),
        ("Celu", "its input is produced by Celu 'celu_1', which is not linear"),
        ("MaxPool", "MaxPool 'maxpool_1' takes the largest element"),
        ("CumSum", "its input is produced by CumSum 'cumsum_1', through which no rule folds"),
        ("Mul", "Mul 'mul_1' joins two computed tensors"),
    ],
)
def test_says_what_stands_between(operator: str, reason: str) -> None:
    net = Net()
    attributes: dict[str, Any] = {"kernel_shape": [1, 1]} if "Pool" in operator else {}
    convolved = net.op("Conv", "x", net.weight(4, 3, 1, 1))
    other = {"CumSum": [net.constant(np.array(1))], "Mul": [net.op("Abs", convolved)]}.get(operator, [])
    between = net.op(operator, convolved, *other, **attributes)
    model = net.model({"x": (2, 3, 9, 8)}, net.norm(between, 4))
    assert refusal(model).startswith(reason.replace("_1", f"_{len(model.graph.node) - 2}"))


def test_says_that_nothing_stands_before() -> None:
    net = Net()
    model = net.model({"x": (2, 3, 9)}, net.norm("x", 3))
    assert refusal(model) == "its input is graph input 'x', with no linear operator before it"


def test_lists_normalizations_of_the_data() -> None:
    net = Net()
    scale, bias = net.weight(4), net.weight(4)
    name = net.op("InstanceNormalization", net.op("Conv", "x", net.weight(4, 3, 1)), scale, bias)
    name = net.op("LayerNormalization", name, net.weight(8), axis=-1)
    name = net.op("LpNormalization", net.op("MeanVarianceNormalization", net.op("LRN", name, size=3), axes=[2]))
    model = net.model({"x": (2, 3, 8)}, name)
    folded, entries = fold_onnx(model)
    assert folded == model
    assert [(entry.operator, entry.num_features) for entry in entries] == [
        ("InstanceNormalization", 4),
        ("LayerNormalization", 8),
        ("LRN", None),
        ("MeanVarianceNormalization", None),
        ("LpNormalization", None),
    ]
    assert {(entry.status, entry.reason) for entry in entries} == {
        ("kept", "its statistics are computed from the data at inference")
    }


def test_writes_and_proves(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    source, target = write(two_layers(), tmp_path), tmp_path / "folded.onnx"
    report = fold_checkpoint(source, target, limits=LIMITS, verify=VERIFY, progress=lambda *step: steps.append(step))
    assert (report.folded, report.nodes_before, report.nodes_after) == (3, 7, 4)
    assert report.certificate is not None
    assert report.certificate.verdict == "equivalent"
    assert report.certificate.folded_sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert report.notes == ()
    assert [entry.consumers for entry in report.entries] == [("relu_2",), ("conv_5",), ()]
    assert {entry.eps_source for entry in report.entries} == {"default of the operator"}
    assert steps == [("load", 0, 4), ("fold", 1, 4), ("write", 2, 4), ("verify", 3, 4), ("done", 4, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded.onnx", "source.onnx"]
    assert operators(load_onnx(target)) == ["Conv", "Relu", "ConvTranspose", "Conv"]


def test_writes_unproven_on_request(tmp_path: Path) -> None:
    report = fold_checkpoint(write(two_layers(), tmp_path), tmp_path / "folded.onnx", limits=LIMITS, verify=None)
    assert report.folded == 3
    assert report.certificate is None


def test_copies_file_where_nothing_folds(tmp_path: Path) -> None:
    net = Net()
    source = write(net.model({"x": (2, 3, 9)}, net.norm(net.op("Relu", "x"), 3)), tmp_path)
    source.write_bytes(source.read_bytes() + b"\x12\x01z")  # a producer's name, where no serializer would put it
    target = tmp_path / "folded.onnx"
    report = fold_checkpoint(source, target, limits=LIMITS, verify=VERIFY)
    assert target.read_bytes() == source.read_bytes()
    assert (report.folded, report.certificate) == (0, None)
    assert report.notes == ("nothing was folded; the file is unchanged",)


def test_notes_frozen_inputs(tmp_path: Path) -> None:
    net = Net()
    output = net.norm(net.op("Conv", "x", net.weight(3, 3, 1)), 3)
    model = net.model({"x": (2, 3, 5)}, output, overridable=sorted(net.initializers), ir_version=3)
    report = fold_checkpoint(
        write(model, tmp_path), tmp_path / "folded.onnx", limits=LIMITS, verify=VERIFY, freeze_initializers=True
    )
    assert report.notes == (
        "5 initializers are no longer graph inputs: callers cannot override them any more",
        "ir_version rose from 3 to 4, where initializers need not be inputs",
    )
    assert report.certificate is not None
    assert report.certificate.verdict == "equivalent"


def test_leaves_no_file_behind_a_refused_source(tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    source.write_bytes(b"\x80\x04}q\x00.")
    with pytest.raises(CheckpointError, match="Python pickle"):
        fold_checkpoint(source, tmp_path / "folded.onnx", limits=LIMITS, verify=VERIFY)
    assert list(tmp_path.iterdir()) == [source]


class WrongRule(ConvTransposeRule):
    """A rule with a mistake: one channel of the bias is off."""

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        right = super().check_backward(graph, index, demand)
        bias = right.operands[2].array.copy()
        bias[0] += np.abs(bias).max()
        return replace(right, operands={**right.operands, 2: Stored(bias, 0.0)})


def test_withdraws_only_the_fold_that_fails_its_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the wrong fold differs too, but only because of it: every region is compared by itself."""
    monkeypatch.setitem(SINKS, "ConvTranspose", WrongRule())
    target = tmp_path / "folded.onnx"
    report = fold_checkpoint(write(two_layers(), tmp_path), target, limits=LIMITS, verify=VERIFY)
    assert [(entry.output, entry.status) for entry in report.entries] == [
        ("first", "folded"),
        ("second", "withdrawn"),
        ("third", "folded"),
    ]
    assert "its proof failed" in (report.entries[1].reason or "")
    assert report.entries[1].into is None
    assert report.certificate is not None
    assert report.certificate.verdict == "equivalent"
    assert operators(load_onnx(target)) == ["Conv", "Relu", "ConvTranspose", "BatchNormalization", "Conv"]


class TamperingRule(ConvTransposeRule):
    """A rule that changes what is none of its business."""

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        for _, node in graph.nodes():
            if node.op_type == "Relu":
                node.op_type = "Abs"
        return super().check_backward(graph, index, demand)


def test_withdraws_all_when_the_difference_is_in_no_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SINKS, "ConvTranspose", TamperingRule())
    net = Net()
    normalized = net.norm(net.op("ConvTranspose", "x", net.weight(3, 4, 3)), 4)
    source, target = (
        write(net.model({"x": ("N", 3, 9)}, net.op("Relu", normalized)), tmp_path),
        tmp_path / "folded.onnx",
    )
    report = fold_checkpoint(source, target, limits=LIMITS, verify=VERIFY)
    assert target.read_bytes() == source.read_bytes()
    assert report.entries[0].status == "withdrawn"
    assert "the proof of the whole network failed" in (report.entries[0].reason or "")


def test_returns_source_when_every_fold_is_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SINKS, "ConvTranspose", WrongRule())
    net = Net()
    model = net.model({"x": ("N", 3, 9)}, net.norm(net.op("ConvTranspose", "x", net.weight(3, 4, 3)), 4))
    source, target = write(model, tmp_path), tmp_path / "folded.onnx"
    report = fold_checkpoint(source, target, limits=LIMITS, verify=VERIFY)
    assert target.read_bytes() == source.read_bytes()
    assert [entry.status for entry in report.entries] == ["withdrawn"]
    assert report.notes[1] == "1 folds were withdrawn because their proof failed"
