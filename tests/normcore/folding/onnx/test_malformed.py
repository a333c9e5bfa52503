"""Operands that onnx's checker lets pass and no runtime takes: each rule refuses them in words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from normcore.folding.affine import identity
from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.passing.joining import ConcatRule
from normcore.folding.onnx.passing.selection import SplitRule
from normcore.folding.onnx.refusal import Refusal
from tests.normcore.folding.builder import Net, forward_refusal, reasons, refusal


@pytest.mark.parametrize(
    ("operator", "weight", "bias", "attributes", "reason"),
    [
        pytest.param("Conv", (4, 3), None, {}, "which is no filter", id="conv-rank"),
        pytest.param(
            "Conv", (4, 3, 1), (3,), {}, "bias of Conv 'conv_0' has shape (3,) for 4 channels", id="conv-bias"
        ),
        pytest.param("Conv", (5, 3, 1), None, {}, "normalizes 4 channels", id="conv-channels"),
        pytest.param("ConvTranspose", (3, 4), None, {}, "does not divide", id="transposed-rank"),
        pytest.param("ConvTranspose", (3, 2, 1), None, {"group": 2}, "into 2 groups", id="transposed-groups"),
        pytest.param("ConvTranspose", (3, 2, 1), None, {"group": 0}, "into 0 groups", id="no-groups"),
        pytest.param("Gemm", (3, 4, 1), None, {}, "rank 3 instead of 2", id="gemm-rank"),
        pytest.param("Gemm", (3, 4), (3,), {}, "C of the Gemm has shape (3,)", id="gemm-bias"),
        pytest.param("Gemm", (3, 4), (1, 1, 4), {}, "C of the Gemm has shape (1, 1, 4)", id="gemm-bias-rank"),
        pytest.param("MatMul", (3,), None, {}, "a weight of rank 1", id="matmul-vector"),
    ],
)
def test_refuses_operands_that_do_not_fit(
    operator: str, weight: tuple[int, ...], bias: tuple[int, ...] | None, attributes: dict[str, Any], reason: str
) -> None:
    net = Net()
    inputs = ["x", net.weight(*weight)] + ([] if bias is None else [net.weight(*bias)])
    shape = {"Gemm": (7, 3), "MatMul": (7, 4, 3)}.get(operator, (7, 3, 5))
    assert reason in refusal(net.model({"x": shape}, net.norm(net.op(operator, *inputs, **attributes), 4)))


def test_refuses_integer_weights() -> None:
    net = Net()
    weight = net.constant(np.ones((4, 3, 1), np.int32))
    assert "of datatype int32" in refusal(net.model({"x": (7, 3, 5)}, net.norm(net.op("Conv", "x", weight), 4)))


def test_refuses_weight_of_text() -> None:
    net = Net()
    weight = net.constant(np.array(["a"], object))
    assert "no numeric tensor" in refusal(net.model({"x": (7, 3, 5)}, net.norm(net.op("Conv", "x", weight), 4)))


def test_refuses_sparse_weight() -> None:
    net = Net()
    output = net.norm(net.op("Conv", "x", "sparse"), 4)
    net.constant(np.ones((4, 3, 1), np.float32), "sparse")
    model = net.model({"x": (7, 3, 5)}, output)
    values, indices = net.initializers["sparse"], helper.make_tensor("indices", 7, [1], [0])
    values.ClearField("dims")
    values.CopyFrom(helper.make_tensor("sparse", 1, [1], [2.0]))
    del model.graph.initializer[[tensor.name for tensor in model.graph.initializer].index("sparse")]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3, 1]))
    folded, (entry,) = fold_onnx(model)
    assert folded == model
    assert (entry.reason or "").startswith(
        "the weight of Conv 'conv_0' is not constant: 'sparse' is given by the caller; "
    )


C = 4
Ahead = Callable[[Net, str], str]
MISUSED: dict[str, tuple[Ahead, str]] = {
    "ratio": (lambda net, name: net.op("Dropout", "x", name), "it is a parameter of Dropout"),
    "padding": (lambda net, name: net.op("Pad", "x", name), "it is a parameter of Pad"),
    "axes": (lambda net, name: net.op("ReduceMean", "x", name), "it is a parameter of ReduceMean"),
    "scales": (lambda net, name: net.op("Resize", "x", "", name), "it is a parameter of Resize"),
    "starts": (lambda net, name: net.op("Slice", "x", name, name), "it is a parameter of Slice"),
    "sizes": (lambda net, name: net.op("Split", "x", name), "it is a parameter of Split"),
    "shape": (lambda net, name: net.op("Reshape", "x", name), "it is the shape of Reshape"),
    "blocks": (lambda net, name: net.op("DepthToSpace", name, blocksize=3), "do not divide into the blocks"),
    "groups": (lambda net, name: net.op("Conv", name, net.weight(5, 2, 1, 1), group=2), "divide into 2 groups"),
    "mode": (lambda net, name: net.op("Resize", name, "", net.weight(4), mode="wild"), "in mode 'wild'"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_refuses_to_go_where_nothing_goes(name: str) -> None:
    build, expected = MISUSED[name]
    net = Net(opset=18)
    output = net.op("Conv", build(net, net.norm("x", C)), net.weight(5, C, 1, 1))
    assert expected in forward_refusal(net.model({"x": (2, C, 6, 5)}, output))


COUNTED: dict[str, tuple[Callable[[Net], str], str]] = {
    "concat": (
        lambda net: net.op("Concat", *(net.op("Conv", "x", net.weight(3, C, 1, 1)) for _ in range(2)), axis=1),
        "it normalizes 4 channels, and Concat 'concat_2' gives 6",
    ),
    "slice": (
        lambda net: net.op(
            "Slice",
            net.op("Conv", "x", net.weight(8, C, 1, 1)),
            *(net.constant(np.array([each])) for each in (0, 5, 1)),
        ),
        "it normalizes 4 channels of 5 that are cut out",
    ),
    "no-type": (
        lambda net: net.op("Cast", net.op("Conv", "x", net.weight(4, 3)), to=TensorProto.FLOAT),
        "leaves the datatype before or behind Cast 'cast_1' free",
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_refuses_what_does_not_add_up(name: str) -> None:
    build, expected = COUNTED[name]
    net = Net(opset=18)
    assert expected in "; ".join(reasons(net.model({"x": (2, C, 6, 5)}, net.norm(build(net), C))))


def test_refuses_map_of_more_channels_than_are_joined_or_split() -> None:
    net = Net()
    net.op("Concat", "x", "x", axis=1)
    graph = Graph(net.model({"x": (2, C, 6, 5)}, net.op("Split", "x", net.constant(np.array([C])), axis=1)))
    wanted = Demand(identity(6), 1, 4)
    with pytest.raises(Refusal, match="joins another number of channels than 6"):
        ConcatRule().forward(graph, 0, 0, wanted)
    with pytest.raises(Refusal, match="splits 4 channels, not 6"):
        SplitRule().forward(graph, 1, 0, wanted)


def test_refuses_constant_norm_that_gives_parameters() -> None:
    net = Net()
    scale = net.op("Reshape", net.norm(net.weight(1, C), C), net.constant(np.array([C])))
    norm = net.op("BatchNormalization", "x", scale, *net.norm_parameters(C)[1:])
    model = net.model({"x": (2, C, 6, 5)}, norm)
    folded, entries = fold_onnx(model)
    assert folded == model
    assert "it is a parameter of BatchNormalization" in (entries[0].reason or "")


def test_refuses_convolution_without_weight() -> None:
    """Which no file has that onnx's checker let pass."""
    net = Net()
    model = net.model({"x": (2, 3, 6, 5)}, net.norm(net.op("Conv", "x", net.weight(C, 3, 1, 1)), C))
    model.graph.node[0].input[1] = ""
    assert "Conv 'conv_0' has no weight" in reasons(model)[0]


def test_merges_no_branches_without_filters() -> None:
    net = Net()
    model = net.model({"x": (2, 3, 6, 5)}, net.op("Add", *(net.op("Conv", "x", net.weight(4, 3)) for _ in range(2))))
    assert fold_onnx(model)[0] == model
