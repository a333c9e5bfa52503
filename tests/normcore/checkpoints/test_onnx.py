"""Hostile and broken files are refused with a reason; sound ones are described."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from normcore.checkpoints.onnx import GraphLimits, TensorSummary, inspect_onnx, load_onnx
from normcore.errors import CheckpointError
from tests.normcore.folding.builder import Net

FLOAT = TensorProto.FLOAT


def tensor(array: object, name: str = "w") -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def model_of(
    nodes: list[NodeProto], *, constants: tuple[TensorProto, ...] = (), opset: int = 17, output: str = "y"
) -> ModelProto:
    x = helper.make_tensor_value_info("x", FLOAT, ("N", 4))
    y = helper.make_tensor_value_info(output, FLOAT, ("a", "b"))
    graph = helper.make_graph(nodes, "net", [x], [y], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def adding(weight: TensorProto) -> ModelProto:
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], constants=(weight,))


def load(model: ModelProto, folder: Path, limits: GraphLimits | None = None) -> ModelProto:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return load_onnx(path, limits=limits or GraphLimits())


def refusal(model: ModelProto, folder: Path, limits: GraphLimits | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(model, folder, limits)
    return str(caught.value)


def test_loads_what_was_saved(tmp_path: Path) -> None:
    model = adding(tensor(np.ones(4, np.float32)))
    assert load(model, tmp_path) == model


def test_loads_real_file(ocr_cls: Path) -> None:
    summary = inspect_onnx(load_onnx(ocr_cls))
    assert (summary.format, summary.opset, summary.ir_version) == ("onnx", 11, 7)
    assert summary.inputs == (TensorSummary("x", "FP32", (-1, 3, -1, -1)),)
    assert summary.outputs == (TensorSummary("save_infer_model/scale_0.tmp_1", "FP32", (-1, 2)),)
    assert (summary.nodes, summary.tensors, summary.parameters) == (566, 308, 133777)
    assert summary.bytes == 4 * summary.parameters + sum(
        4 * numpy_helper.to_array(node.attribute[0].t).size
        for node in load_onnx(ocr_cls).graph.node
        if node.op_type == "Constant" and node.attribute[0].t.data_type == TensorProto.INT64
    )
    assert (summary.operators["Conv"], summary.operators["BatchNormalization"]) == (53, 35)
    assert not summary.has_training_mode


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_refuses_half_a_file(share: float, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    content = adding(tensor(np.ones((400, 4), np.float32))).SerializeToString()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="damaged, cut short or not ONNX"):
        load_onnx(path)


def test_refuses_pickle_named_onnx(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(CheckpointError, match="this is a Python pickle; export the model to ONNX"):
        load_onnx(path)


def external(array: object = (1.0,)) -> TensorProto:
    weight = TensorProto(name="w", data_type=FLOAT, dims=[len(np.asarray(array))], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../etc/passwd")
    return weight


def branches(body: GraphProto) -> ModelProto:
    condition = tensor(np.array(True), "condition")
    node = helper.make_node("If", ["condition"], ["y"], then_branch=body, else_branch=body)
    return model_of([node], constants=(condition,))


def in_branch(*nodes: NodeProto, constants: tuple[TensorProto, ...] = ()) -> ModelProto:
    inner = helper.make_tensor_value_info("inner", FLOAT, ("a", "b"))
    return branches(helper.make_graph(list(nodes), "body", [], [inner], list(constants)))


def listing(weight: TensorProto) -> ModelProto:
    node = helper.make_node("Relu", ["x"], ["y"])
    node.attribute.add(name="values", type=onnx.AttributeProto.TENSORS).tensors.append(weight)
    return model_of([node])


def sparse_model() -> ModelProto:
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])])
    sparse = helper.make_sparse_tensor(external(), tensor(np.zeros(1, np.int64), "indices"), [4])
    model.graph.sparse_initializer.append(sparse)
    return model


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: adding(external(np.ones(4))), id="initializer"),
        pytest.param(lambda: model_of([helper.make_node("Constant", [], ["y"], value=external())]), id="attribute"),
        pytest.param(
            lambda: in_branch(helper.make_node("Add", ["x", "w"], ["inner"]), constants=(external(np.ones(4)),)),
            id="subgraph",
        ),
        pytest.param(
            lambda: in_branch(helper.make_node("Constant", [], ["inner"], value=external())), id="subgraph-attribute"
        ),
        pytest.param(lambda: listing(external()), id="attribute-list"),
        pytest.param(sparse_model, id="sparse"),
    ],
)
def test_refuses_external_data(make: Callable[[], ModelProto], tmp_path: Path) -> None:
    assert "tensor 'w' keeps its data in another file" in refusal(make(), tmp_path)


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "evil"])
def test_refuses_operators_of_other_domains(domain: str, tmp_path: Path) -> None:
    message = refusal(model_of([helper.make_node("Gelu", ["x"], ["y"], domain=domain)]), tmp_path)
    assert f"operator Gelu of domain '{domain}'" in message
    inner = helper.make_node("Gelu", ["x"], ["inner"], domain=domain)
    assert f"of domain '{domain}'" in refusal(in_branch(inner), tmp_path)


def test_accepts_unused_import_of_another_domain(tmp_path: Path) -> None:
    model = adding(tensor(np.ones(4, np.float32)))
    model.opset_import.add(domain="pkg.onnxscript.torch_lib.common", version=1)
    load(model, tmp_path)


def test_refuses_local_function(tmp_path: Path) -> None:
    model = adding(tensor(np.ones(4, np.float32)))
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("d", "Mine", ["a"], ["b"], body, list(model.opset_import)))
    assert "defines its own function 'Mine'" in refusal(model, tmp_path)


def test_refuses_training_graphs(tmp_path: Path) -> None:
    model = adding(tensor(np.ones(4, np.float32)))
    model.training_info.add()
    assert "training graphs" in refusal(model, tmp_path)


def nested(depth: int) -> ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, ("a", "b"))],
    )
    for level in range(depth - 1):
        name = f"inner_{level}"
        node = helper.make_node("If", ["condition"], [name], then_branch=body, else_branch=body)
        result = helper.make_tensor_value_info(name, FLOAT, ("a", "b"))
        body = helper.make_graph([node], f"body_{level}", [], [result])
    return branches(body)


def test_bounds_nesting(tmp_path: Path) -> None:
    load(nested(4), tmp_path)
    assert "nested more than 4 deep" in refusal(nested(5), tmp_path)


def test_refuses_nesting_beyond_the_parser(tmp_path: Path) -> None:
    """Length-prefixed by hand: no tool would write it, and parsers have crashed on it."""

    def field(number: int, content: bytes) -> bytes:
        size, prefix = len(content), bytearray()
        while size > 127:
            prefix.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *prefix, size]) + content

    graph = b""
    for _ in range(2000):
        graph = field(1, field(5, field(6, graph)))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08" + field(7, graph))
    with pytest.raises(CheckpointError):
        load_onnx(path)


def test_bounds_nodes_with_subgraphs(tmp_path: Path) -> None:
    model = in_branch(
        *(helper.make_node("Relu", ["x"], [f"t{i}"]) for i in range(9)), helper.make_node("Relu", ["x"], ["inner"])
    )
    load(model, tmp_path, GraphLimits(max_nodes=21))
    assert "more than 20 nodes" in refusal(model, tmp_path, GraphLimits(max_nodes=20))


def test_refuses_cycle(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "y"], ["t"]), helper.make_node("Relu", ["t"], ["y"])]
    assert "topologically sorted" in refusal(model_of(nodes), tmp_path)


def test_refuses_missing_output(tmp_path: Path) -> None:
    assert "'z' is not an output" in refusal(model_of([helper.make_node("Relu", ["x"], ["y"])], output="z"), tmp_path)


def test_refuses_name_made_twice(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    assert "'y' has been used as output names multiple times" in refusal(model_of(nodes), tmp_path)


def test_refuses_unknown_operator(tmp_path: Path) -> None:
    assert "No Op registered for Frobnicate" in refusal(
        model_of([helper.make_node("Frobnicate", ["x"], ["y"])]), tmp_path
    )


@pytest.mark.parametrize("opset", [0, 1000])
def test_refuses_unknown_opset(opset: int, tmp_path: Path) -> None:
    model = adding(tensor(np.ones(4, np.float32)))
    model.opset_import[0].version = opset
    assert f"opset {opset} is not known" in refusal(model, tmp_path)


def test_refuses_two_opsets_of_the_same_operators(tmp_path: Path) -> None:
    """Whether a batch norm with five outputs is in training mode would depend on which of them a reader takes."""
    model = adding(tensor(np.ones(4, np.float32)))
    model.opset_import.append(helper.make_opsetid("ai.onnx", 9))
    assert "several versions of the standard operators: [9, 17]" in refusal(model, tmp_path)


def test_refuses_missing_opset(tmp_path: Path) -> None:
    model = adding(tensor(np.ones(4, np.float32)))
    del model.opset_import[:]
    assert "opset_import" in refusal(model, tmp_path)


def test_refuses_missing_graph(tmp_path: Path) -> None:
    assert "holds no graph" in refusal(ModelProto(ir_version=8), tmp_path)


def bent(**changes: object) -> TensorProto:
    weight = tensor(np.ones(4, np.float32))
    for name, value in changes.items():
        if name == "dims":
            weight.dims[:] = value
        else:
            setattr(weight, name, value)
    return weight


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        pytest.param(bent(dims=[5]), "needs 20 bytes, received 16", id="too-short"),
        pytest.param(bent(dims=[3]), "needs 12 bytes, received 16", id="too-long"),
        pytest.param(bent(dims=[-4]), "negative size", id="negative"),
        pytest.param(bent(dims=[2**62, 2**62]), "at most 1073741824 are accepted", id="overflow"),
        pytest.param(bent(data_type=99), "unknown data type 99", id="unknown-type"),
        pytest.param(bent(data_type=0), "unknown data type 0", id="undefined-type"),
        pytest.param(
            TensorProto(name="w", data_type=FLOAT, dims=[4], float_data=[1.0]),
            "needs 4 values in float_data",
            id="typed",
        ),
        pytest.param(
            TensorProto(name="w", data_type=FLOAT, dims=[4], int64_data=[1] * 4), "in float_data", id="wrong-field"
        ),
        pytest.param(TensorProto(name="w", data_type=FLOAT, dims=[4]), "received none", id="empty"),
        pytest.param(
            TensorProto(name="w", data_type=FLOAT, dims=[1], raw_data=b"1234", float_data=[1.0]), "received", id="both"
        ),
    ],
)
def test_refuses_tensor_of_wrong_length(weight: TensorProto, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(adding(weight), tmp_path)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3]), id="int4-typed"),
        pytest.param(helper.make_tensor("w", TensorProto.BFLOAT16, [3], [1, 2, 3]), id="bfloat16"),
        pytest.param(
            TensorProto(name="w", data_type=TensorProto.COMPLEX64, dims=[2], float_data=[1, 2, 3, 0]), id="complex"
        ),
        pytest.param(tensor(np.array(["a", "b"], object)), id="string"),
        pytest.param(helper.make_tensor("w", TensorProto.BOOL, [2], [True, False]), id="bool"),
        pytest.param(helper.make_tensor("w", FLOAT, [0, 4], []), id="no-elements"),
        pytest.param(tensor(np.float64(3)), id="scalar"),
    ],
)
def test_accepts_tensor_of_any_datatype(weight: TensorProto, tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["w"], ["unused"]), helper.make_node("Relu", ["x"], ["y"])]
    load(model_of(nodes, constants=(weight,)), tmp_path)


BIG = 2**40


def int64(*values: int, name: str = "s") -> TensorProto:
    return tensor(np.array(values, np.int64), name)


def producing(operator: str, *inputs: str, constants: tuple[TensorProto, ...] = (), **attributes: Any) -> ModelProto:
    nodes = [helper.make_node(operator, list(inputs), ["t"], **attributes), helper.make_node("ReduceSum", ["t"], ["y"])]
    return model_of(nodes, constants=constants)


def computed(*shape_nodes: NodeProto, constants: tuple[TensorProto, ...]) -> ModelProto:
    nodes = [
        *shape_nodes,
        helper.make_node("ConstantOfShape", ["s"], ["t"]),
        helper.make_node("ReduceSum", ["t"], ["y"]),
    ]
    return model_of(nodes, constants=constants)


ONE = tensor(np.ones((1, 1), np.float32), "one")
BOMBS = {
    "constant-of-shape": producing("ConstantOfShape", "s", constants=(int64(2**20, 2**20),)),
    "expand": producing("Expand", "one", "s", constants=(ONE, int64(2**20, 2**20))),
    "expand-input": producing("Expand", "x", "s", constants=(int64(BIG, 1, 1),)),
    "tile": producing("Tile", "one", "s", constants=(ONE, int64(2**20, 2**20))),
    "pad": producing("Pad", "one", "s", constants=(ONE, int64(2**20, 2**20, 0, 0))),
    "resize": producing("Resize", "one", "", "", "s", constants=(ONE, int64(2**20, 2**20))),
    "range": producing(
        "Range", "a", "b", "c", constants=tuple(tensor(np.float32(v), n) for v, n in ((0, "a"), (1e10, "b"), (1, "c")))
    ),
    "one-hot": producing(
        "OneHot", "x", "d", "v", constants=(int64(BIG, name="d"), tensor(np.array([0, 1], np.float32), "v"))
    ),
    "random": producing("RandomNormal", shape=[2**20, 2**20]),
    "outer-product": model_of(
        [
            helper.make_node("ConstantOfShape", ["s"], ["column"]),
            helper.make_node("Transpose", ["column"], ["row"], perm=[1, 0]),
            helper.make_node("MatMul", ["column", "row"], ["y"]),
        ],
        constants=(int64(2**20, 1),),
    ),
    "product": computed(helper.make_node("Mul", ["e", "e"], ["s"]), constants=(int64(2**20, name="e"),)),
    "cast": computed(helper.make_node("Cast", ["f"], ["s"], to=7), constants=(tensor(np.array([1e6, 1e6]), "f"),)),
    "concatenation": computed(
        helper.make_node("Constant", [], ["e"], value_ints=[2**20]),
        helper.make_node("Concat", ["e", "e"], ["s"], axis=0),
        constants=(),
    ),
    "shape-of-constant": computed(
        helper.make_node("ConstantOfShape", ["e"], ["v"]),
        helper.make_node("Shape", ["v"], ["s0"]),
        helper.make_node("Mul", ["s0", "s0"], ["s"]),
        constants=(int64(2**20, 3, name="e"),),
    ),
    "subgraph": in_branch(
        helper.make_node("Constant", [], ["s"], value_ints=[2**20, 2**20]),
        helper.make_node("ConstantOfShape", ["s"], ["t"]),
        helper.make_node("ReduceSum", ["t"], ["inner"]),
    ),
    # onnx's own data propagation takes gigabytes for these two before it can say anything.
    "vector-sum": model_of(
        [
            helper.make_node("ConstantOfShape", ["s"], ["v"], value=int64(3)),
            helper.make_node("Add", ["v", "v"], ["w"]),
            helper.make_node("ConstantOfShape", ["w"], ["y"]),
        ],
        constants=(int64(2**28),),
    ),
    "doubling": model_of(
        [
            *(helper.make_node("Concat", [f"v{i}"] * 8, [f"v{i + 1}"], axis=0) for i in range(11)),
            helper.make_node("ConstantOfShape", ["v11"], ["y"]),
        ],
        constants=(int64(3, name="v0"),),
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_refuses_small_file_that_expands(name: str, tmp_path: Path) -> None:
    assert "at most 1073741824 are accepted" in refusal(BOMBS[name], tmp_path)


def test_refuses_expansion_by_captured_shape(tmp_path: Path) -> None:
    model = in_branch(
        helper.make_node("ConstantOfShape", ["s"], ["t"]), helper.make_node("ReduceSum", ["t"], ["inner"])
    )
    model.graph.initializer.append(int64(2**20, 2**20))
    assert "at most 1073741824 are accepted" in refusal(model, tmp_path)


def test_does_not_believe_sizes_that_a_subgraph_claims(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["s"], ["t"]), helper.make_node("ReduceSum", ["t"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, ("a", "b"))],
        [int64(2**20, 2**20)],
        value_info=[helper.make_tensor_value_info("t", FLOAT, (1, 1))],
    )
    assert "at most 1073741824 are accepted" in refusal(branches(body), tmp_path)


def test_refuses_large_sparse_tensor(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])])
    values = tensor(np.ones(1, np.float32), "w")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, int64(0, name="i"), [BIG]))
    assert "at most 1073741824 are accepted" in refusal(model, tmp_path)


def test_accepts_what_the_limit_allows(tmp_path: Path) -> None:
    model = producing("ConstantOfShape", "s", constants=(int64(16, 16),))
    load(model, tmp_path, GraphLimits(max_tensor_bytes=1024))
    assert "takes 1024 bytes" in refusal(model, tmp_path, GraphLimits(max_tensor_bytes=1023))


def test_refuses_contradicting_shapes_or_leaves_them_to_the_runtime(tmp_path: Path) -> None:
    """Inference gives up on a node it cannot type; what follows is unknown, not an error of ours."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    load(model_of(nodes, constants=(tensor(np.ones((5, 3), np.float32)),)), tmp_path)


@pytest.mark.parametrize(
    ("opset", "attributes", "statistics"),
    [(17, {"training_mode": 1}, ["mean", "var"]), (9, {}, ["mean", "var", "saved_mean", "saved_var"])],
)
def test_describes_training_mode(opset: int, attributes: dict[str, Any], statistics: list[str], tmp_path: Path) -> None:
    net = Net(opset=opset)
    net.norm("x", 3, **attributes)
    net.nodes[-1].output.extend(statistics)
    model = net.model({"x": (2, 3, 5)}, net.nodes[-1].output[0])
    assert inspect_onnx(load(model, tmp_path)).has_training_mode


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("is_node", [True, False])
def test_describes_dropout(mode: bool, is_node: bool, tmp_path: Path) -> None:
    constant = tensor(np.array(mode), "mode")
    nodes = [helper.make_node("Constant", [], ["mode"], value=constant)] if is_node else []
    nodes.append(helper.make_node("Dropout", ["x", "", "mode"], ["y"]))
    model = model_of(nodes, constants=() if is_node else (constant,))
    assert inspect_onnx(load(model, tmp_path)).has_training_mode == mode


def test_describes_tensors_of_other_kinds() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])])
    model.graph.input.append(helper.make_tensor_sequence_value_info("items", FLOAT, None))
    model.graph.input.append(helper.make_tensor_value_info("codes", TensorProto.FLOAT8E4M3FN, None))
    model.graph.input.append(helper.make_tensor_value_info("scalar", TensorProto.BFLOAT16, []))
    model.graph.initializer.append(tensor(np.array(["a", "bc"], object), "words"))
    summary = inspect_onnx(model)
    assert summary.inputs[1:] == (
        TensorSummary("items", "sequence", None),
        TensorSummary("codes", "FLOAT8E4M3FN", None),
        TensorSummary("scalar", "BF16", ()),
    )
    assert (summary.tensors, summary.parameters, summary.bytes) == (1, 2, 3)


def test_hides_inputs_that_have_defaults(tmp_path: Path) -> None:
    model = load_onnx(Path(onnx.__file__).parent / "backend/test/data/light/light_shufflenet.onnx")
    assert [each.name for each in inspect_onnx(model).inputs] == ["gpu_0/data_0"]
