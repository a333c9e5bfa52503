"""Constant evaluation against onnxruntime."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from normcore.checkpoints.onnx_constants import EVALUATED, evaluate
from normcore.execution import open_session, run

VECTOR = np.arange(1, 7, dtype=np.int64)
MATRIX = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
CUBE = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
NEGATIVE = np.array([-7, 7, -7], np.int64)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


CASES: list[tuple[str, tuple[NDArray[Any], ...], dict[str, Any]]] = [
    ("Identity", (MATRIX,), {}),
    ("Cast", (MATRIX + 0.7,), {"to": TensorProto.INT64}),
    ("Cast", (MATRIX,), {"to": TensorProto.FLOAT16}),
    ("CastLike", (VECTOR, MATRIX), {}),
    ("ConstantOfShape", (ints(2, 3),), {}),
    ("ConstantOfShape", (ints(),), {"value": numpy_helper.from_array(ints(5))}),
    ("Expand", (MATRIX[:, :1], ints(4, 1, 3)), {}),
    ("Shape", (MATRIX,), {}),
    ("Shape", (MATRIX,), {"start": -1}),
    ("Shape", (MATRIX,), {"start": 0, "end": 1}),
    ("Size", (MATRIX,), {}),
    ("Gather", (MATRIX, ints(1, -1)), {"axis": 1}),
    ("Gather", (VECTOR, np.array(-2)), {}),
    ("Range", (np.array(1), np.array(8), np.array(3)), {}),
    ("Range", (np.array(3), np.array(-3), np.array(-2)), {}),
    ("Range", (np.array(3), np.array(0), np.array(2)), {}),
    ("Slice", (VECTOR, ints(1), ints(4)), {}),
    ("Slice", (MATRIX, ints(-2), ints(2**62), ints(1), ints(1)), {}),
    ("Slice", (VECTOR, ints(-1), ints(-(2**62)), ints(0), ints(-2)), {}),
    ("Slice", (VECTOR, ints(-99), ints(-(2**62)), ints(0), ints(-1)), {}),
    ("Squeeze", (MATRIX.reshape(1, 2, 1, 3),), {}),
    ("Squeeze", (MATRIX.reshape(1, 2, 1, 3), ints(-2)), {}),
    ("Unsqueeze", (MATRIX, ints(0, -1)), {}),
    ("Reshape", (MATRIX, ints(0, -1, 1)), {}),
    ("Transpose", (MATRIX,), {"perm": [1, 0]}),
    ("Transpose", (MATRIX,), {}),
    ("Concat", (VECTOR, NEGATIVE), {"axis": 0}),
    ("Add", (MATRIX, MATRIX[:1]), {}),
    ("Sub", (MATRIX, MATRIX[:, :1]), {}),
    ("Mul", (VECTOR, VECTOR), {}),
    ("Div", (NEGATIVE, ints(2, -2, -2)), {}),
    ("Div", (MATRIX, MATRIX[::-1].copy()), {}),
    ("Mod", (NEGATIVE, ints(3, 3, -3)), {}),
    ("Mod", (MATRIX - 3, MATRIX[:1]), {"fmod": 1}),
    ("Pow", (MATRIX, np.array(0.5, np.float32)), {}),
    ("Pow", (MATRIX, ints(2)), {}),
    ("Max", (MATRIX, MATRIX[:, ::-1].copy()), {}),
    ("Min", (MATRIX, MATRIX[:1], MATRIX[:, ::-1].copy()), {}),
    ("Equal", (VECTOR, VECTOR[::-1].copy()), {}),
    ("Where", (MATRIX > 2, MATRIX, MATRIX[:1]), {}),
    ("Neg", (MATRIX,), {}),
    ("Abs", (NEGATIVE,), {}),
    ("Sqrt", (MATRIX,), {}),
    ("Reciprocal", (MATRIX,), {}),
    ("Exp", (MATRIX,), {}),
    ("Log", (MATRIX,), {}),
    ("ReduceSum", (MATRIX, ints(0)), {}),
    ("ReduceSum", (MATRIX,), {"keepdims": 0}),
    ("ReduceSum", (MATRIX,), {"noop_with_empty_axes": 1}),
    ("ReduceMean", (MATRIX,), {"axes": [-1], "keepdims": 0}),
    ("ReduceMax", (MATRIX,), {"axes": [0]}),
    ("ReduceMin", (MATRIX,), {"axes": [0]}),
    ("ReduceL1", (-MATRIX,), {"axes": [1]}),
    ("ReduceL2", (MATRIX,), {"axes": [0, 1]}),
    ("ReduceSumSquare", (MATRIX,), {"axes": [1]}),
    *((f"Reduce{name}", (MATRIX - 3,), {"noop_with_empty_axes": 1}) for name in ("SumSquare", "L1", "L2", "Max")),
    ("MatMul", (MATRIX, MATRIX.T.copy()), {}),
    ("Clip", (MATRIX, np.array(2, np.float32), np.array(5, np.float32)), {}),
    ("Clip", (MATRIX, np.array(2, np.float32)), {}),
    ("LpNormalization", (MATRIX,), {"axis": 0}),
    ("LpNormalization", (-MATRIX,), {"p": 1}),
    ("BatchNormalization", (CUBE, *[MATRIX[0]] * 4), {"epsilon": 1e-3}),
    ("BatchNormalization", (CUBE, *(MATRIX[0].copy() for _ in range(4))), {"training_mode": 1}),
    ("InstanceNormalization", (CUBE, *[MATRIX[0]] * 2), {"epsilon": 1e-3}),
    ("MatMul", (MATRIX, MATRIX[0].copy()), {}),
    ("Flatten", (MATRIX.reshape(1, 2, 1, 3),), {"axis": -1}),
]


@pytest.mark.parametrize(("operator", "operands", "attributes"), CASES)
def test_equals_onnxruntime(operator: str, operands: tuple[NDArray[Any], ...], attributes: dict[str, Any]) -> None:
    names = [f"input{slot}" for slot in range(len(operands))]
    outputs = ["y", "mean", "var"] if attributes.get("training_mode") else ["y"]
    node = helper.make_node(operator, names, outputs, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(operand.dtype), operand.shape)
            for name, operand in zip(names, operands, strict=True)
        ],
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
    )
    graph.output[0].ClearField("type")
    opset = 18 if "noop_with_empty_axes" in attributes else 17
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    session = open_session(model.SerializeToString(), threads=1, optimization="none")
    (expected,) = run(session, dict(zip(names, operands, strict=True)), deadline_s=10)
    result = evaluate(node, operands, operands[0].shape, max_elements=100)
    assert result is not None
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-6 if expected.dtype.kind == "f" else 0, atol=2e-7)


def test_has_a_case_for_every_operator() -> None:
    assert {operator for operator, _, _ in CASES} | {"Constant"} == EVALUATED


@pytest.mark.parametrize(("operator", "operands", "attributes"), CASES)
def test_bounds_result(operator: str, operands: tuple[NDArray[Any], ...], attributes: dict[str, Any]) -> None:
    node = helper.make_node(operator, [f"input{slot}" for slot in range(len(operands))], ["y"], **attributes)
    result = evaluate(node, operands, operands[0].shape, max_elements=1)
    assert result is None or result.size <= 1 or operator == "Shape"


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_floats": [0.5, 1.5]}, np.array([0.5, 1.5], np.float32)),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [3, 4]}, ints(3, 4)),
        ({"value": numpy_helper.from_array(MATRIX)}, MATRIX),
        ({"value_string": "text"}, None),
        ({"value": numpy_helper.from_array(np.array(["text"], object))}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_reads_constant(attributes: dict[str, Any], expected: NDArray[Any] | None) -> None:
    result = evaluate(helper.make_node("Constant", [], ["y"], **attributes), [], None, max_elements=6)
    if expected is None:
        assert result is None
    else:
        assert result is not None
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("operator", "operands", "attributes"),
    [
        pytest.param("Relu", (MATRIX,), {}, id="other-operator"),
        pytest.param("Add", (MATRIX, None), {}, id="unknown-operand"),
        pytest.param("Reshape", (MATRIX, ints(7)), {}, id="wrong-size"),
        pytest.param("Expand", (MATRIX, ints(5)), {}, id="wrong-shape"),
        pytest.param("ConstantOfShape", (ints(-1),), {}, id="negative-size"),
        pytest.param("Unsqueeze", (MATRIX,), {}, id="no-axes"),
        pytest.param("Gather", (VECTOR, ints(9)), {}, id="out-of-range"),
        pytest.param("Concat", (VECTOR, VECTOR), {}, id="no-axis"),
        pytest.param("Range", (np.array(0), np.array(1), np.array(0)), {}, id="endless"),
        pytest.param("Add", (MATRIX[:, :, None], np.ones((1, 1, 99), np.float32)), {}, id="large-by-broadcasting"),
    ],
)
def test_gives_nothing(operator: str, operands: tuple[NDArray[Any] | None, ...], attributes: dict[str, Any]) -> None:
    node = helper.make_node(operator, [f"input{slot}" for slot in range(len(operands))], ["y"], **attributes)
    assert evaluate(node, operands, None, max_elements=100) is None


@pytest.mark.parametrize("operator", ["Shape", "Size"])
@pytest.mark.parametrize("shape", [None, (2, None)])
def test_does_not_guess_free_sizes(operator: str, shape: tuple[int | None, ...] | None) -> None:
    assert evaluate(helper.make_node(operator, ["x"], ["y"]), [None], shape, max_elements=100) is None


def test_reads_known_part_of_shape() -> None:
    result = evaluate(helper.make_node("Shape", ["x"], ["y"], start=1), [None], (None, 3), max_elements=100)
    np.testing.assert_array_equal(result, [3])


def test_ignores_operators_of_other_domains() -> None:
    assert evaluate(helper.make_node("Identity", ["x"], ["y"], domain="d"), [VECTOR], None, max_elements=9) is None
