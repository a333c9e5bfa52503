from collections.abc import Sequence

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from normcore.execution import open_session
from normcore.independence import RowCheck, check_rows

ROWS, COLUMNS = "N", 4


def _network(nodes: list[NodeProto], *, rows: int | str = ROWS, elem_type: int = TensorProto.FLOAT) -> ModelProto:
    weight = np.random.default_rng(0).standard_normal((COLUMNS, COLUMNS)).astype(np.float32)
    ones = [numpy_helper.from_array(np.ones(COLUMNS, np.float32), name) for name in ("scale", "zero", "mean", "var")]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", elem_type, [rows, COLUMNS])],
        [helper.make_tensor_value_info("y", elem_type, None)],
        [numpy_helper.from_array(weight, "weight"), *ones],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _check(nodes: list[NodeProto], *, rows: int | str = ROWS, shape: Sequence[int] = (3, COLUMNS)) -> RowCheck:
    model = _network(nodes, rows=rows)
    session = open_session(model.SerializeToString(), threads=1)
    return check_rows(model, session, {"x": tuple(shape)}, seed=0, deadline_s=10)


def test_a_linear_network_treats_rows_apart() -> None:
    found = _check([helper.make_node("MatMul", ["x", "weight"], ["h"]), helper.make_node("Tanh", ["h"], ["y"])])
    assert found.are_independent
    assert found.worst_ulps is not None
    assert found.worst_ulps <= 8


def test_frozen_batch_norm_treats_rows_apart() -> None:
    assert _check(
        [helper.make_node("BatchNormalization", ["x", "scale", "zero", "mean", "var"], ["y"])]
    ).are_independent


@pytest.mark.parametrize(
    "nodes",
    [
        [
            helper.make_node(
                "BatchNormalization", ["x", "scale", "zero", "mean", "var"], ["y", "m", "v"], training_mode=1
            )
        ],
        [helper.make_node("ReduceMax", ["x"], ["peak"], axes=[0]), helper.make_node("Sub", ["x", "peak"], ["y"])],
        [helper.make_node("CumSum", ["x", "axis"], ["y"])],
    ],
    ids=["training_mode", "peak_of_the_batch", "sum_over_earlier_rows"],
)
def test_networks_that_mix_rows_are_found(nodes: list[NodeProto]) -> None:
    if nodes[0].op_type == "CumSum":
        axis = numpy_helper.from_array(np.array(0))
        nodes = [helper.make_node("Constant", [], ["axis"], value=axis), *nodes]
    found = _check(nodes)
    assert not found.are_independent
    assert found.worst_ulps is not None
    assert found.worst_ulps > 1000


def test_outputs_without_the_rows_are_found() -> None:
    found = _check([helper.make_node("ReduceSum", ["x"], ["y"])])
    assert not found.are_independent
    assert "output y has shape [1, 1]" in found.sentence


def test_a_fixed_first_axis_is_named() -> None:
    found = _check([helper.make_node("Neg", ["x"], ["y"])], rows=3)
    assert not found.are_independent
    assert "first axis of input x is not free" in found.sentence


def test_a_number_of_rows_fixed_inside_the_graph_is_found() -> None:
    shape = numpy_helper.from_array(np.array([3, 2, 2]))
    nodes = [helper.make_node("Constant", [], ["s"], value=shape), helper.make_node("Reshape", ["x", "s"], ["y"])]
    found = _check(nodes)
    assert not found.are_independent
    assert "does not take every number of rows" in found.sentence
