import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from normcore.checkpoints.onnx import inspect_onnx
from normcore.errors import CheckpointError
from normcore.execution import open_session, run
from normcore.freezing import freeze_training_mode

CHANNELS = 3
GENERATOR = np.random.default_rng(0)
SCALE, BIAS, MEAN = GENERATOR.standard_normal((3, CHANNELS)).astype(np.float32)
VAR = GENERATOR.uniform(0.5, 2, CHANNELS).astype(np.float32)
X = GENERATOR.standard_normal((5, CHANNELS)).astype(np.float32)
FROZEN = (X - MEAN) / np.sqrt(VAR + 1e-5) * SCALE + BIAS


def _model(nodes: list[NodeProto], outputs: tuple[str, ...] = ("y",), *, opset: int = 17) -> ModelProto:
    weights = {"scale": SCALE, "bias": BIAS, "mean": MEAN, "var": VAR}
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS])],
        [_output(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _output(name: str, elem_type: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    shape: list[str | int | None] = ["N", CHANNELS] if name in ("y", "a", "b", "mask") else [CHANNELS]
    return helper.make_tensor_value_info(name, elem_type, shape)


def _norm(*outputs: str, training_mode: int = 0) -> NodeProto:
    node = helper.make_node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], list(outputs))
    if training_mode:
        node.attribute.append(helper.make_attribute("training_mode", training_mode))
    return node


def _compute(model: ModelProto) -> list[NDArray[np.float32]]:
    return run(open_session(model.SerializeToString(), threads=1, optimization="none"), {"x": X}, deadline_s=10)


def test_a_batch_norm_in_training_mode_takes_its_running_statistics() -> None:
    model = _model([_norm("y", "m", "v", training_mode=1)])
    before = model.SerializeToString()
    frozen, changed = freeze_training_mode(model)

    assert changed == ("y",)
    assert not inspect_onnx(frozen).has_training_mode
    np.testing.assert_allclose(_compute(frozen)[0], FROZEN, rtol=1e-5, atol=1e-6)
    assert not np.allclose(_compute(model)[0], FROZEN, atol=1e-2)
    assert model.SerializeToString() == before


def test_updated_statistics_that_are_used_become_the_running_ones() -> None:
    frozen, _ = freeze_training_mode(_model([_norm("y", "m", "v", training_mode=1)], ("y", "m", "v")))
    y, mean, var = _compute(frozen)
    np.testing.assert_allclose(y, FROZEN, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mean, MEAN)
    np.testing.assert_array_equal(var, VAR)


def test_an_old_batch_norm_that_lists_five_outputs_is_frozen() -> None:
    frozen, changed = freeze_training_mode(_model([_norm("y", "m", "v", "saved_mean", "saved_var")], opset=9))
    assert changed == ("y",)
    np.testing.assert_allclose(_compute(frozen)[0], FROZEN, rtol=1e-5, atol=1e-6)


def test_statistics_of_the_batch_cannot_be_frozen() -> None:
    model = _model([_norm("y", "m", "v", "saved_mean", "saved_var")], ("y", "saved_var"), opset=9)
    with pytest.raises(CheckpointError, match="saved_var"):
        freeze_training_mode(model)


def test_a_dropout_passes_its_input_on() -> None:
    constants = [
        helper.make_node("Constant", [], ["ratio"], value=numpy_helper.from_array(np.array(0.9, np.float32))),
        helper.make_node("Constant", [], ["mode"], value=numpy_helper.from_array(np.array(True))),
    ]
    dropout = helper.make_node("Dropout", ["x", "ratio", "mode"], ["y", "mask"])
    frozen, changed = freeze_training_mode(_model([*constants, dropout]))
    assert changed == ("y",)
    np.testing.assert_array_equal(_compute(frozen)[0], X)
    masked = _model([*constants, dropout], ("y",))
    masked.graph.output.append(_output("mask", TensorProto.BOOL))
    with pytest.raises(CheckpointError, match="mask"):
        freeze_training_mode(masked)


def test_what_is_frozen_already_stays_as_it_is() -> None:
    model = _model([_norm("y")])
    frozen, changed = freeze_training_mode(model)
    assert changed == ()
    assert frozen == model


def test_a_batch_norm_inside_a_branch_is_frozen() -> None:
    def branch(name: str, node: NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], name, [], [_output(node.output[0])])

    condition = helper.make_node("Constant", [], ["go"], value=numpy_helper.from_array(np.array(True)))
    choice = helper.make_node(
        "If",
        ["go"],
        ["y"],
        then_branch=branch("then", _norm("a", "m", "v", training_mode=1)),
        else_branch=branch("else", helper.make_node("Identity", ["x"], ["b"])),
    )
    frozen, changed = freeze_training_mode(_model([condition, choice]))
    assert changed == ("a",)
    np.testing.assert_allclose(_compute(frozen)[0], FROZEN, rtol=1e-5, atol=1e-6)
