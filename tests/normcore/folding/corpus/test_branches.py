"""RepVGG and its kin: parallel branches of one tensor that are added up."""

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from normcore.folding.fold import fold_onnx
from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators

C = 6
SPATIAL = {1: (10,), 2: (10, 8), 3: (6, 5, 4)}


def block(
    rank: int, *, group: int = 1, stride: int = 1, has_identity: bool = True, operator: str = "Add", **third: Any
) -> ModelProto:
    net = Net()
    common: dict[str, Any] = {"group": group, "strides": [stride] * rank}
    large = net.op("Conv", "x", net.weight(C, C // group, *[3] * rank), pads=[1] * 2 * rank, **common)
    small = net.op("Conv", "x", net.weight(C, C // group, *[1] * rank), **{**common, **third})
    branches = [net.norm(large, C), net.norm(small, C)] + ([net.norm("x", C)] if has_identity else [])
    if operator == "Sum":
        total = net.op("Sum", *branches)
    else:
        total = branches[0]
        for branch in branches[1:]:
            total = net.op("Add", branch, total)
    return net.model({"x": (2, C, *SPATIAL[rank])}, net.op("Relu", total))


@pytest.mark.parametrize("operator", ["Add", "Sum"])
@pytest.mark.parametrize("group", [1, 2, C])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_merges_repvgg_block(rank: int, group: int, operator: str) -> None:
    folded, entries = fold_and_compare(block(rank, group=group, operator=operator), x=noise(2, C, *SPATIAL[rank]))
    assert operators(folded) == ["Conv", "Relu"]
    assert {entry.status for entry in entries} == {"folded"}
    assert [entry.rule for entry in entries if entry.operator == "BatchNormalization"][2] == "branches"


def test_merges_strided_block_without_identity() -> None:
    folded, _ = fold_and_compare(block(2, stride=2, has_identity=False), x=noise(2, C, 10, 8))
    assert operators(folded) == ["Conv", "Relu"]


@pytest.mark.parametrize(
    ("large", "small"),
    [
        pytest.param({"k": 5, "pads": [2, 2, 2, 2]}, {"k": 3, "pads": [1, 1, 1, 1]}, id="3-in-5"),
        pytest.param({"k": 3, "pads": [2] * 4, "dilations": [2, 2]}, {"k": 1}, id="point-in-dilated"),
        pytest.param({"k": 5, "pads": [2] * 4}, {"k": 3, "pads": [2] * 4, "dilations": [2, 2]}, id="dilated-in-dense"),
        pytest.param({"k": 4, "pads": [1, 2, 2, 1]}, {"k": 1}, id="even-kernel-off-centre"),
        pytest.param({"k": 3, "pads": [1] * 4}, {"k": 3, "pads": [1] * 4}, id="equal-kernels"),
    ],
)
def test_merges_kernels_that_lie_in_one_another(large: dict[str, Any], small: dict[str, Any]) -> None:
    net = Net()
    parts = [
        net.op("Conv", "x", net.weight(4, C, each["k"], each["k"]), **{k: v for k, v in each.items() if k != "k"})
        for each in (small, large)
    ]
    scaled = net.norm(net.op("Add", *parts), 4)
    folded, _ = fold_and_compare(net.model({"x": (2, C, 10, 8)}, scaled), x=noise(2, C, 10, 8))
    assert operators(folded) == ["Conv"]


@pytest.mark.parametrize(
    ("large", "small"),
    [
        pytest.param({"k": 3}, {"k": 3, "pads": [1, 1, -1, -1]}, id="shifted"),
        pytest.param({"k": 3, "pads": [1] * 4, "auto_pad": "NOTSET"}, {"k": 1, "group": 2}, id="groups"),
        pytest.param({"k": 3, "auto_pad": "SAME_UPPER"}, {"k": 1}, id="auto-pad"),
        pytest.param({"k": 2, "pads": [2] * 4, "dilations": [4, 4]}, {"k": 1}, id="between-taps"),
    ],
)
def test_keeps_kernels_that_do_not(large: dict[str, Any], small: dict[str, Any]) -> None:
    net = Net()
    parts = [
        net.op(
            "Conv",
            "x",
            net.weight(C, C // each.get("group", 1), each["k"], each["k"]),
            **{k: v for k, v in each.items() if k != "k"},
        )
        for each in (small, large)
    ]
    model = net.model({"x": (2, C, 10, 8)}, net.op("Add", *parts))
    folded, entries = fold_onnx(model)
    assert folded == model
    assert entries == ()


def test_keeps_branches_of_different_strides() -> None:
    net = Net()
    large = net.op("Conv", "x", net.weight(C, C, 3, 3), pads=[1] * 4)
    small = net.op("Conv", "x", net.weight(C, C, 1, 1), strides=[10, 8])
    model = net.model({"x": (2, C, 10, 8)}, net.op("Add", large, small))
    assert fold_onnx(model)[0] == model


def test_keeps_norm_beside_convolution_of_other_size() -> None:
    """One channel of the sum is broadcast: no kernel does that."""
    net = Net()
    large = net.op("Conv", "x", net.weight(1, C, 3, 3), pads=[1] * 4)
    model = net.model({"x": (2, C, 10, 8)}, net.op("Add", large, net.norm("x", C)))
    folded, (entry,) = fold_onnx(model)
    assert folded == model
    assert entry.status == "kept"


def test_keeps_branch_that_others_read() -> None:
    net = Net()
    large = net.op("Conv", "x", net.weight(C, C, 3, 3), pads=[1] * 4)
    normed = net.norm("x", C)
    model = net.model({"x": (2, C, 10, 8)}, net.op("Mul", net.op("Add", large, normed), net.op("Tanh", normed)))
    assert fold_onnx(model)[0] == model


def test_refuses_float16_sum_that_overflows() -> None:
    net = Net(dtype=np.float16)
    large = net.constant(np.full((C, C, 3, 3), 4e4, np.float16))
    parts = [net.op("Conv", "x", weight, pads=[1] * 4) for weight in (large, large)]
    model = net.model({"x": (2, C, 10, 8)}, net.op("Add", *parts))
    assert fold_onnx(model)[0] == model


def test_merges_branches_whose_weights_stood_in_constant_nodes() -> None:
    """What a fold stores under a new name is known by its shape as soon as it is there."""
    net = Net()
    branches = []
    for size in (3, 5):
        net.constant(net.generator.standard_normal((C, C, size, size)).astype(np.float32), f"k{size}")
        weight = net.op("Constant", value=net.initializers.pop(f"k{size}"))
        branches.append(net.norm(net.op("Conv", "x", weight, pads=[size // 2] * 4), C))
    model = net.model({"x": (2, C, 10, 8)}, net.op("Relu", net.op("Add", *branches)))
    folded, _ = fold_and_compare(model, tolerance=1e-5, x=noise(2, C, 10, 8))
    assert operators(folded) == ["Conv", "Relu"]
