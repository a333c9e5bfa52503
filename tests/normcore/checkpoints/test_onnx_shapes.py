import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from normcore.checkpoints.onnx_shapes import TensorType, infer_types
from normcore.errors import CheckpointError
from tests.normcore.folding.builder import Net

FLOAT = TensorProto.FLOAT


def test_follows_sizes_through_rounds_of_computation() -> None:
    """Each Shape waits for the tensor that the vector before it sized."""
    net = Net()
    two = net.constant(np.array([2]))
    size = net.op("Mul", two, two)
    for _ in range(3):
        filled = net.op("ConstantOfShape", size, value=numpy_helper.from_array(np.zeros(1, np.float32)))
        size = net.op("Mul", net.op("Shape", filled), two)
    net.op("ConstantOfShape", size, output="last")
    model = net.model({"x": (2, 3)}, net.op("Relu", "x"))
    assert infer_types(model).top["last"] == TensorType(FLOAT, (32,))


def test_knows_rank_of_reshape_to_free_sizes() -> None:
    net = Net()
    rows = net.op("Gather", net.op("Shape", "x"), net.constant(np.array([0])))
    sizes = net.op("Concat", rows, net.constant(np.array([-1])), axis=0)
    flat = net.op("Reshape", "x", sizes)
    found = infer_types(net.model({"x": ("N", 3, "L")}, flat)).top[flat]
    assert found == TensorType(FLOAT, (None, None))


def test_does_not_read_large_weights_for_their_shape() -> None:
    net = Net()
    stored = net.op("Constant", value=numpy_helper.from_array(np.ones((64, 32), np.float32)))
    product = net.op("MatMul", net.op("MatMul", "x", net.weight(48, 64)), stored)
    types = infer_types(net.model({"x": ("N", 48)}, product)).top
    assert types[product].shape == (None, 32)
    assert types[stored].shape == (64, 32)


def test_knows_subgraphs() -> None:
    net = Net()
    sizes = net.constant(np.array([3, 4]))
    branch = helper.make_graph(
        [NodeProto(op_type="ConstantOfShape", input=[sizes], output=["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, ("a", "b"))],
    )
    model = net.model({"x": (2, 3)}, net.op("If", net.constant(np.array(True)), then_branch=branch, else_branch=branch))
    assert infer_types(model).everywhere.count(("inner", TensorType(FLOAT, (3, 4)))) == 2


def test_ignores_sequences() -> None:
    net = Net()
    items = net.op("SequenceConstruct", "x", "x")
    model = net.model({"x": (2, 3)}, net.op("ConcatFromSequence", items, axis=0))
    assert items not in infer_types(model).top


def test_refuses_contradiction() -> None:
    net = Net()
    model = net.model({"x": (2, 3)}, net.op("Add", "x", net.constant(np.ones(3, np.float32), "w")))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.int64), "w"))
    with pytest.raises(CheckpointError, match="the shapes of the graph cannot be inferred"):
        infer_types(model)
