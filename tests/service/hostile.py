"""Uploads that must be refused, as small as they come."""

import pickle

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model(
    nodes: list[onnx.NodeProto],
    *,
    initializers: tuple[onnx.TensorProto, ...] = (),
    domains: tuple[str, ...] = (),
    shape: tuple[int | str, ...] = ("N", 4),
) -> onnx.ModelProto:
    """A graph from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def serialized(built: onnx.ModelProto) -> bytes:
    return bytes(built.SerializeToString())


def small_conv() -> bytes:
    """Conv -> BatchNormalization, legal."""
    generator = np.random.default_rng(1)
    weights = {
        "w": generator.standard_normal((4, 3, 1, 1)),
        "scale": generator.uniform(0.5, 1.5, 4),
        "bias": generator.standard_normal(4),
        "mean": generator.standard_normal(4),
        "var": generator.uniform(0.5, 1.5, 4),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["y"], name="norm"),
    ]
    initializers = tuple(numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items())
    return serialized(model(nodes, initializers=initializers, shape=("N", 3, "H", "W")))


def training_norm() -> bytes:
    """A batch norm exported in training mode."""
    original = onnx.load_from_string(small_conv())
    original.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    original.graph.node[1].output.extend(["running_mean", "running_var"])
    return serialized(original)


def cut_in_half() -> bytes:
    content = small_conv()
    return content[: len(content) // 2]


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('an upload ran code')",))


def pickled() -> bytes:
    return pickle.dumps(_Payload())


def external_data() -> bytes:
    original = onnx.load_from_string(small_conv())
    weight = original.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../etc/passwd"), ("length", "48")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return serialized(original)


def custom_domain() -> bytes:
    return serialized(model([helper.make_node("Evil", ["x"], ["y"], domain="com.evil")], domains=("com.evil",)))


def gigabytes() -> bytes:
    """A constant of four numbers that becomes a tensor of a terabyte."""
    size = numpy_helper.from_array(np.array([1024, 1024, 1024, 256], np.int64), "size")
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["big"]),
        helper.make_node("ReduceMax", ["big"], ["m"], keepdims=0),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    return serialized(model(nodes, initializers=(size,)))


def endless_loop() -> bytes:
    """A Loop whose condition stays true and whose count is the largest there is."""
    count = numpy_helper.from_array(np.array(2**62, np.int64), "count")
    nodes = [helper.make_node("Loop", ["count", "always", "x"], ["y"], body=_sines())]
    return serialized(model(nodes, initializers=(count, _ALWAYS)))


def endless_loop_before_norm() -> bytes:
    """Conv -> BatchNormalization that folds at once, and whose proof would never end."""
    built = onnx.load_from_string(small_conv())
    built.graph.node[0].input[0] = "late"
    built.graph.node.insert(0, helper.make_node("Loop", ["count", "always", "x"], ["late"], body=_sines(4)))
    count = numpy_helper.from_array(np.array(2**62, np.int64), "count")
    built.graph.initializer.extend((count, _ALWAYS))
    return serialized(built)


def counted_loop() -> bytes:
    """A Loop that runs as often as the largest element of its input says: legal, and as slow as the caller wants."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["count"], to=TensorProto.INT64),
        helper.make_node("Loop", ["count", "always", "x"], ["y"], body=_sines()),
    ]
    return serialized(model(nodes, initializers=(_ALWAYS,)))


_ALWAYS = numpy_helper.from_array(np.array(True), "always")


def _sines(rank: int = 2) -> onnx.GraphProto:
    return helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Sin", ["carried"], ["carried_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, [None] * rank),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_on", TensorProto.FLOAT, [None] * rank),
        ],
    )
