"""Small ONNX graphs, some of them hostile."""

from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

F32 = TensorProto.FLOAT


def value(name: str, shape: list[int | str] | None, elem_type: int = F32) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, shape)


def save(model: ModelProto, folder: Path) -> Path:
    path = folder / f"{model.graph.name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def model(name: str, nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
    graph: GraphProto = helper.make_graph(nodes, name, inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def constant(name: str, array: object, dtype: str = "int64") -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(array, dtype=dtype)))


def doubling() -> ModelProto:
    nodes = [helper.make_node("Add", ["x", "x"], ["sum"]), helper.make_node("Neg", ["x"], ["negative"])]
    outputs = [value("sum", ["N", 3]), value("negative", ["N", 3])]
    return model("doubling", nodes, [value("x", ["N", 3])], outputs)


def free_rank() -> ModelProto:
    return model("free_rank", [helper.make_node("Neg", ["x"], ["y"])], [value("x", None)], [value("y", None)])


def free_columns() -> ModelProto:
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
    outputs = [value("y", ["N", "C"]), value("z", ["N", "C"])]
    return model("free_columns", nodes, [value("x", ["N", "C"])], outputs)


def fixed_rows() -> ModelProto:
    return model("fixed_rows", [helper.make_node("Neg", ["x"], ["y"])], [value("x", [2, 3])], [value("y", [2, 3])])


def lookup(*, rows: int) -> ModelProto:
    """Fails on numbers that are no rows of its table."""
    nodes = [constant("table", np.ones((rows, 2)), "float32"), helper.make_node("Gather", ["table", "x"], ["y"])]
    return model("lookup", nodes, [value("x", ["N", 1], TensorProto.INT64)], [value("y", ["N", 1, 2])])


def centered_over_the_batch() -> ModelProto:
    """Takes the mean over the rows away: no row stands for itself."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return model("centered", nodes, [value("x", ["N", 3])], [value("y", ["N", 3])])


def repeated_as_often_as_the_input_says() -> ModelProto:
    """Its output has as many rows as the first number of the input says."""
    nodes = [
        constant("first", [0]),
        constant("one", [1]),
        helper.make_node("Reshape", ["x", "minus"], ["flat"]),
        helper.make_node("Gather", ["flat", "first"], ["number"]),
        helper.make_node("Cast", ["number"], ["count"], to=TensorProto.INT64),
        helper.make_node("Concat", ["count", "one"], ["shape"], axis=0),
        helper.make_node("Expand", ["x", "shape"], ["y"]),
    ]
    outputs = [value("y", ["M", 3])]
    return model("repeated", [constant("minus", [-1]), *nodes], [value("x", [1, 3])], outputs)


def text() -> ModelProto:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return model("text", nodes, [value("x", ["N"], TensorProto.STRING)], [value("y", ["N"], TensorProto.STRING)])


def endless_loop() -> ModelProto:
    """A Loop without a trip count whose condition stays true."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["state"], ["next"])],
        "body",
        [value("turn", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("state", ["N", 3])],
        [value("go_on", [], TensorProto.BOOL), value("next", ["N", 3])],
    )
    nodes = [constant("always", True, "bool"), helper.make_node("Loop", ["", "always", "x"], ["y"], body=body)]
    return model("endless_loop", nodes, [value("x", ["N", 3])], [value("y", ["N", 3])])


def memory_bomb(*, side: int) -> ModelProto:
    """A square of `side` zeros each way, four bytes each, out of the shape of any input."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], end=1),
        constant("zero", [0]),
        constant("side", [side]),
        helper.make_node("Mul", ["shape", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "side"], ["rows"]),
        helper.make_node("Concat", ["rows", "rows"], ["huge"], axis=0),
        helper.make_node("ConstantOfShape", ["huge"], ["ones"]),
        helper.make_node("ReduceSum", ["ones"], ["y"], keepdims=0),
    ]
    return model("memory_bomb", nodes, [value("x", ["N", 3])], [value("y", [])])


def batch_norm(*, training: bool) -> ModelProto:
    channels = [(name, np.ones(2, dtype=np.float32)) for name in ("weight", "bias", "mean", "var")]
    nodes = [constant(name, array, "float32") for name, array in channels]
    outputs = ["y", "new_mean", "new_var"] if training else ["y"]
    nodes.append(
        helper.make_node(
            "BatchNormalization", ["x", *(name for name, _ in channels)], outputs, training_mode=int(training)
        )
    )
    return model("batch_norm", nodes, [value("x", ["N", 2])], [value("y", ["N", 2])])


def convolution_with_batch_norm() -> ModelProto:
    generator = np.random.default_rng(7)
    weights = {"kernel": generator.normal(size=(4, 3, 3, 3)), "weight": np.full(4, 1.5), "bias": np.arange(4)}
    weights |= {"mean": generator.normal(size=4), "var": np.full(4, 0.5)}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["features"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["features", "weight", "bias", "mean", "var"], ["y"], name="norm"),
    ]
    network = model(
        "convolution", nodes, [value("x", ["N", 3, "height", "width"])], [value("y", ["N", 4, "height", "width"])]
    )
    for name, array in weights.items():
        network.graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype=np.float32), name))
    return network
