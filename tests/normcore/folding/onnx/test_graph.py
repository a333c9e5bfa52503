import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from normcore.folding.fold import fold_onnx
from normcore.folding.plan import plan_onnx
from tests.normcore.folding.builder import Net, difference, evaluate, fold_and_compare, noise, operators, refusal


def names(model: ModelProto) -> list[str]:
    return sorted(tensor.name for tensor in model.graph.initializer)


def test_clones_weight_that_two_norms_use() -> None:
    """One convolution weight, called twice, each call with its own batch norm."""
    net = Net()
    weight = net.weight(3, 3, 1)
    first = net.norm(net.op("Conv", "x", weight), 3)
    model = net.model({"x": (2, 3, 5)}, net.norm(net.op("Conv", first, weight), 3))
    folded, entries = fold_and_compare(model, x=noise(2, 3, 5))
    assert [entry.status for entry in entries] == ["folded", "folded"]
    assert operators(folded) == ["Conv", "Conv"]
    assert folded.graph.node[0].input[1] != folded.graph.node[1].input[1]


def test_clones_weight_that_an_unnormalized_path_uses() -> None:
    net = Net()
    weight, bias = net.weight(3, 3, 1), net.weight(3)
    plain = net.op("Conv", "x", weight, bias)
    normalized = net.norm(net.op("Conv", "x", weight, bias), 3)
    folded, _ = fold_and_compare(net.model({"x": (2, 3, 5)}, plain, normalized), x=noise(2, 3, 5))
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in folded.graph.initializer}
    np.testing.assert_array_equal(kept[weight], numpy_helper.to_array(net.initializers[weight]))
    np.testing.assert_array_equal(kept[bias], numpy_helper.to_array(net.initializers[bias]))


def test_clones_statistics_that_two_norms_share() -> None:
    net = Net()
    shared = net.norm_parameters(3)
    hidden = net.op("BatchNormalization", net.op("Conv", "x", net.weight(3, 3, 1)), *shared)
    output = net.op("BatchNormalization", net.op("Conv", hidden, net.weight(3, 3, 1)), *shared)
    folded, entries = fold_and_compare(net.model({"x": (2, 3, 5)}, output), x=noise(2, 3, 5))
    assert len(entries) == 2
    assert len(folded.graph.initializer) == 4


def test_refuses_convolution_with_two_norms() -> None:
    net = Net()
    shared = net.op("Conv", "x", net.weight(3, 3, 1))
    model = net.model({"x": (2, 3, 5)}, net.norm(shared, 3), net.norm(shared, 3))
    folded, entries = fold_onnx(model)
    assert folded == model
    assert (entries[0].reason or "").startswith(
        "the output of Conv 'conv_0' has a second consumer BatchNormalization 'batchnormalization_2'; forward: "
    )
    assert "second consumer BatchNormalization 'batchnormalization_1'" in (entries[1].reason or "")


def test_refuses_second_consumer() -> None:
    net = Net()
    shared = net.op("Conv", "x", net.weight(3, 3, 1))
    model = net.model({"x": (2, 3, 5)}, net.op("Add", net.norm(shared, 3), net.op("Relu", shared)))
    assert refusal(model) == "the output of Conv 'conv_0' has a second consumer Relu 'relu_2'"


def test_refuses_second_consumer_of_convolution_before_addition() -> None:
    net = Net()
    shared = net.op("Conv", "x", net.weight(3, 3, 1))
    normalized = net.norm(net.op("Add", shared, net.weight(3, 1)), 3)
    model = net.model({"x": (2, 3, 5)}, net.op("Mul", normalized, net.op("Relu", shared)))
    assert refusal(model) == "the output of Conv 'conv_0' has a second consumer Relu 'relu_3'"


def test_refuses_intermediate_output() -> None:
    net = Net()
    hidden = net.op("Conv", "x", net.weight(3, 3, 1), output="hidden")
    assert "'hidden', which is also an output of the graph" in refusal(
        net.model({"x": (2, 3, 5)}, net.norm(hidden, 3), hidden)
    )


def conditional(net: Net, *, captured: str) -> str:
    """An If whose branches read a tensor of the graph around them."""
    branches = []
    for operator in ("Relu", "Neg"):
        node = helper.make_node(operator, [captured], [f"{operator}_out"])
        result = helper.make_tensor_value_info(f"{operator}_out", TensorProto.FLOAT, (2, 3, 5))
        branches.append(helper.make_graph([node], operator, [], [result]))
    condition = net.constant(np.array(True))
    return net.op("If", condition, then_branch=branches[0], else_branch=branches[1])


def test_sees_consumer_in_subgraph() -> None:
    net = Net()
    hidden = net.op("Conv", "x", net.weight(3, 3, 1))
    other = conditional(net, captured=hidden)
    model = net.model({"x": (2, 3, 5)}, net.op("Add", net.norm(hidden, 3), other))
    assert refusal(model) == "the output of Conv 'conv_0' has a second consumer If 'if_1'"


def test_keeps_name_that_subgraph_captures() -> None:
    net = Net()
    normalized = net.norm(net.op("Conv", "x", net.weight(3, 3, 1)), 3)
    folded, _ = fold_and_compare(net.model({"x": (2, 3, 5)}, conditional(net, captured=normalized)), x=noise(2, 3, 5))
    assert operators(folded) == ["Conv", "If"]


def test_reports_norm_inside_subgraph() -> None:
    net = Net()
    weight, parameters = net.weight(3, 3, 1), net.norm_parameters(3)
    nodes = [
        helper.make_node("Conv", ["x", weight], ["inner"]),
        helper.make_node("BatchNormalization", ["inner", *parameters], ["normalized"], name="deep"),
    ]
    result = helper.make_tensor_value_info("normalized", TensorProto.FLOAT, (2, 3, 5))
    body = helper.make_graph(nodes, "body", [], [result])
    output = net.op("If", net.constant(np.array(True)), then_branch=body, else_branch=body)
    model = net.model({"x": (2, 3, 5)}, net.op("Identity", output))
    _, entries = fold_onnx(model)
    assert [(entry.normalization, entry.status) for entry in entries] == [("deep", "kept")] * 2
    assert {entry.reason for entry in entries} == {"it is inside a subgraph of If 'if_0'"}


def test_keeps_names_of_private_weights() -> None:
    net = Net()
    weight = net.constant(noise(4, 3, 1), "layer.weight")
    model = net.model({"x": (2, 3, 5)}, net.norm(net.op("Conv", "x", weight), 4, output="features"))
    folded, _ = fold_and_compare(model, x=noise(2, 3, 5))
    assert names(folded) == ["layer.bias", "layer.weight"]
    assert folded.graph.node[0].name == "conv_0"
    assert list(folded.graph.node[0].output) == ["features"]


def test_clones_weight_that_is_an_output() -> None:
    net = Net()
    weight = net.weight(3, 3, 1)
    model = net.model({"x": (2, 3, 5)}, net.norm(net.op("Conv", "x", weight), 3), weight)
    folded, _ = fold_and_compare(model, x=noise(2, 3, 5))
    assert operators(folded) == ["Conv"]


def test_finds_free_name_for_new_bias() -> None:
    net = Net()
    weight, taken = net.constant(noise(4, 3, 1), "layer.weight"), net.constant(noise(4, 1), "layer.bias")
    output = net.op("Add", net.norm(net.op("Conv", "x", weight), 4), taken)
    folded, _ = fold_and_compare(net.model({"x": (2, 3, 5)}, output), x=noise(2, 3, 5))
    assert names(folded) == ["layer.bias", "layer.bias_2", "layer.weight"]


def test_drops_stale_value_info_only() -> None:
    net = Net()
    hidden = net.op("Conv", "x", net.weight(3, 3, 1), output="hidden")
    model = net.model({"x": (2, 3, 5)}, net.op("Relu", net.norm(hidden, 3, output="normalized")))
    model = onnx.shape_inference.infer_shapes(model)
    assert {info.name for info in model.graph.value_info} == {"hidden", "normalized"}
    folded, _ = fold_and_compare(model, x=noise(2, 3, 5))
    assert [info.name for info in folded.graph.value_info] == ["normalized"]


def test_keeps_metadata() -> None:
    net = Net()
    model = net.model({"x": ("batch", 3, "length")}, net.norm(net.op("Conv", "x", net.weight(3, 3, 1)), 3))
    model.producer_name = "somebody"
    model.metadata_props.add(key="licence", value="theirs")
    folded, _ = fold_and_compare(model, x=noise(2, 3, 5))
    assert (folded.producer_name, folded.metadata_props) == (model.producer_name, model.metadata_props)


def overridable_network(*, ir_version: int) -> ModelProto:
    net = Net()
    output = net.norm(net.op("Conv", "x", net.weight(3, 3, 1)), 3)
    return net.model({"x": (2, 3, 5)}, output, overridable=sorted(net.initializers), ir_version=ir_version)


def test_refuses_overridable_initializers() -> None:
    reason = refusal(overridable_network(ir_version=3))
    assert "is also a graph input, which callers may override; the option freeze_initializers" in reason


@pytest.mark.parametrize("ir_version", [3, 8])
def test_freezes_initializers_on_request(ir_version: int) -> None:
    model = overridable_network(ir_version=ir_version)
    folded, (entry,) = fold_onnx(model, freeze_initializers=True)
    assert entry.status == "folded"
    assert [info.name for info in folded.graph.input] == ["x"]
    assert folded.ir_version == max(ir_version, 4)
    before, after = (evaluate(each, x=noise(2, 3, 5))[0] for each in (model, folded))
    assert difference(after, before) < 3e-6


def test_refuses_overridable_constant_of_addition() -> None:
    net = Net()
    offset = net.weight(3, 1)
    output = net.norm(net.op("Add", net.op("Conv", "x", net.weight(3, 3, 1)), offset), 3)
    assert "freeze_initializers" in refusal(net.model({"x": (2, 3, 5)}, output, overridable=[offset]))


def test_follows_constants_through_chains() -> None:
    """Constant, Identity, Cast, ConstantOfShape, and the computed zero bias of one exporter."""
    net = Net()
    stored = net.op("Constant", value=numpy_helper.from_array(noise(4, 3, 1).astype(np.float64)))
    weight = net.op("Identity", net.op("Cast", stored, to=TensorProto.FLOAT))
    start = net.op("Constant", value_ints=[0])
    count = net.op("Slice", net.op("Shape", weight), start, net.op("Constant", value_ints=[1]))
    zero = net.op("CastLike", net.op("Constant", value_float=0.0), "x")
    convolved = net.op("Conv", "x", weight, net.op("Expand", zero, count))
    ones = net.op("ConstantOfShape", count, value=numpy_helper.from_array(np.ones(1, np.float32)))
    scale = net.op("Constant", value_floats=[0.5, 2.0, -1.0, 3.0])
    output = net.op("BatchNormalization", convolved, scale, ones, ones, ones)
    folded, _ = fold_and_compare(net.model({"x": (2, 3, 5)}, output), x=noise(2, 3, 5))
    assert operators(folded) == ["Conv"]
    assert len(folded.graph.initializer) == 2


def test_keeps_constants_that_others_use() -> None:
    net = Net()
    ones = net.op("ConstantOfShape", net.constant(np.array([3])), value=numpy_helper.from_array(np.ones(1, np.float32)))
    normalized = net.op("BatchNormalization", net.op("Conv", "x", net.weight(3, 3, 1)), ones, ones, ones, ones)
    model = net.model({"x": (2, 3, 3)}, net.op("Add", normalized, ones))
    folded, _ = fold_and_compare(model, x=noise(2, 3, 3))
    assert operators(folded) == ["ConstantOfShape", "Conv", "Add"]


def test_stops_on_exponential_constant_chain() -> None:
    net = Net()
    weight = net.weight(3, 3, 1)
    for _ in range(60):
        weight = net.op("Add", weight, weight)
    plan_onnx(net.model({"x": (2, 3, 5)}, net.norm(net.op("Conv", "x", weight), 3)))


def test_refuses_endless_constant_chain() -> None:
    net = Net()
    weight = net.weight(3, 3, 1)
    for _ in range(70):
        weight = net.op("Identity", weight)
    assert "is computed at run time by Identity" in refusal(
        net.model({"x": (2, 3, 5)}, net.norm(net.op("Conv", "x", weight), 3))
    )
