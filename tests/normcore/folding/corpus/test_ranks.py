"""The patterns of both directions over one, two and three axes of space, with groups and without."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from normcore.folding.onnx.options import FoldOptions, ZeroPadding
from tests.normcore.folding.builder import Net, fold_and_compare, noise, operators

C = 4
SPACE = {1: (9,), 2: (9, 7), 3: (6, 7, 5)}
RANKS = pytest.mark.parametrize("rank", SPACE, ids=["1d", "2d", "3d"])
GROUPS = pytest.mark.parametrize("group", [1, 2], ids=["dense", "grouped"])
Step = Callable[[Net, str, int], str]


def ints(net: Net, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def per_channel(net: Net, rank: int) -> str:
    return net.weight(C, *[1] * rank)


def positive_norm(net: Net, name: str, *, shift: float = 1.0) -> str:
    vectors = [np.abs(noise(C, seed=2)) + 0.5, shift * noise(C), 0 * noise(C) + shift, np.abs(noise(C)) + 0.5]
    return net.op("BatchNormalization", name, *(net.constant(each.astype(np.float32)) for each in vectors))


def scales(net: Net, rank: int) -> str:
    return net.constant(np.array([1, 1, *[2] * rank], np.float32))


def moved(net: Net, name: str, rank: int) -> str:
    order = [rank + 1, *range(rank + 1)]
    return net.op("Transpose", net.op("Transpose", name, perm=order), perm=[*range(1, rank + 2), 0])


def joined(net: Net, name: str, rank: int, *, axis: int) -> str:
    return net.op("Concat", name, net.op("Conv", "x", net.weight(C, 4, *[1] * rank), net.weight(C)), axis=axis)


BEHIND: dict[str, tuple[Step, list[str]]] = {
    "directly": (lambda net, name, rank: name, []),
    "identity": (lambda net, name, rank: net.op("Identity", name), ["Identity"]),
    "dropout": (lambda net, name, rank: net.op("Dropout", name), ["Dropout"]),
    "average": (lambda net, name, rank: net.op("AveragePool", name, kernel_shape=[2] * rank), ["AveragePool"]),
    "average-uncounted": (
        lambda net, name, rank: net.op("AveragePool", name, kernel_shape=[3] * rank, pads=[1] * 2 * rank),
        ["AveragePool"],
    ),
    "global-average": (lambda net, name, rank: net.op("GlobalAveragePool", name), ["GlobalAveragePool"]),
    "mean": (lambda net, name, rank: net.op("ReduceMean", name, axes=[-1]), ["ReduceMean"]),
    "nearest": (lambda net, name, rank: net.op("Resize", name, "", scales(net, rank)), ["Resize"]),
    "slice": (
        lambda net, name, rank: net.op("Slice", name, ints(net, 1), ints(net, -1), ints(net, -1)),
        ["Slice"],
    ),
    "edge": (
        lambda net, name, rank: net.op("Pad", name, ints(net, *([0, 0] + [1] * rank) * 2), mode="edge"),
        ["Pad"],
    ),
    "transposed": (moved, ["Transpose", "Transpose"]),
    "flattened": (lambda net, name, rank: net.op("Reshape", name, ints(net, 0, 0, -1)), ["Reshape"]),
    "joined-in-space": (lambda net, name, rank: joined(net, name, rank, axis=2), ["Conv", "Concat"]),
    "multiplied": (lambda net, name, rank: net.op("Mul", name, per_channel(net, rank)), []),
    "divided": (lambda net, name, rank: net.op("Div", name, per_channel(net, rank)), []),
    "added": (lambda net, name, rank: net.op("Add", per_channel(net, rank), name), []),
    "subtracted-from": (lambda net, name, rank: net.op("Sub", per_channel(net, rank), name), []),
    "normalized-before": (lambda net, name, rank: net.norm(name, C), []),
}


def linear(net: Net, operator: str, rank: int, group: int) -> str:
    """Of 4 input channels; nothing of the input is lost where the transposed one has stride 1."""
    weight = net.weight(C, 4 // group, *[3] * rank)
    return net.op(operator, "x", weight, net.weight(C), group=group, pads=[1] * 2 * rank)


@RANKS
@GROUPS
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("name", BEHIND)
def test_folds_backward(name: str, operator: str, group: int, rank: int) -> None:
    build, between = BEHIND[name]
    net = Net()
    output = net.norm(build(net, linear(net, operator, rank, group), rank), C)
    shape = (2, 4, *SPACE[rank])
    folded, entries = fold_and_compare(net.model({"x": shape}, output), tolerance=6e-6, x=noise(*shape))
    assert operators(folded) == [operator, *between]
    assert {entry.status for entry in entries} == {"folded"}


@RANKS
@GROUPS
@pytest.mark.parametrize("pool", ["MaxPool", "GlobalMaxPool", "Relu"])
def test_folds_positive_scales_backward(pool: str, group: int, rank: int) -> None:
    net = Net()
    attributes: dict[str, Any] = {"kernel_shape": [2] * rank} if pool == "MaxPool" else {}
    between = net.op(pool, linear(net, "Conv", rank, group), **attributes)
    output = positive_norm(net, between, shift=0.0 if pool == "Relu" else 1.0)
    shape = (2, 4, *SPACE[rank])
    folded, _ = fold_and_compare(net.model({"x": shape}, output), x=noise(*shape))
    assert operators(folded) == ["Conv", pool]


@RANKS
def test_folds_into_joined_channels(rank: int) -> None:
    net = Net()
    output = net.norm(joined(net, linear(net, "Conv", rank, 2), rank, axis=1), 2 * C)
    shape = (2, 4, *SPACE[rank])
    folded, _ = fold_and_compare(net.model({"x": shape}, output), x=noise(*shape))
    assert operators(folded) == ["Conv", "Conv", "Concat"]


AHEAD: dict[ZeroPadding, list[str]] = {
    "offset": ["Add", "Conv"],
    "map": ["Conv", "Add"],
    "pad": ["Pad", "Add", "Conv"],
}


@RANKS
@GROUPS
@pytest.mark.parametrize("option", AHEAD)
def test_folds_into_zero_padded_convolution(option: ZeroPadding, group: int, rank: int) -> None:
    net = Net()
    weight = net.weight(6, C // group, *[3] * rank)
    pads = [1, 2, 0][:rank] + [2, 0, 1][:rank]
    strides = [2, 1, 2][:rank]
    output = net.op("Conv", net.norm("x", C), weight, net.weight(6), group=group, pads=pads, strides=strides)
    shape = (2, C, *SPACE[rank])
    options: FoldOptions = {"zero_padding": option}
    folded, _ = fold_and_compare(net.model({"x": shape}, output), options=options, x=noise(*shape))
    assert operators(folded) == AHEAD[option]


@RANKS
@GROUPS
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("pool", ["AveragePool", "MaxPool", "GlobalAveragePool", "Identity", "Transpose"])
def test_folds_forward(pool: str, operator: str, group: int, rank: int) -> None:
    net = Net()
    attributes: dict[str, Any] = {"kernel_shape": [2] * rank} if pool in ("AveragePool", "MaxPool") else {}
    normed = positive_norm(net, "x")
    between = moved(net, normed, rank) if pool == "Transpose" else net.op(pool, normed, **attributes)
    output = net.op(operator, between, net.weight(C, C // group, *[1] * rank), net.weight(C), group=group)
    shape = (2, C, *SPACE[rank])
    folded, _ = fold_and_compare(net.model({"x": shape}, output), x=noise(*shape))
    assert operators(folded) == [*[pool] * (2 if pool == "Transpose" else 1), operator]
