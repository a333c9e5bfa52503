"""Small random networks, a fold of them that shares no code with the product, and mutants of folded graphs."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
Mutation = Callable[[ModelProto], None]

LINEAR = ("Conv", "ConvTranspose", "Gemm")


class Builder:
    """Collects nodes and initializers of a graph that starts at `x`."""

    def __init__(self, seed: int, *, dtype: Any = np.float32, mean_over_sigma: float = 1.0) -> None:
        self.generator = np.random.default_rng(seed)
        self.dtype = dtype
        self.mean_over_sigma = mean_over_sigma
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def constant(self, name: str, values: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(values).astype(self.dtype), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{operator}_{output}", **attributes))
        return output

    def normalization(self, x: str, channels: int, output: str, *, eps: float = 1e-5) -> str:
        generator = self.generator
        var = generator.uniform(0.5, 2.0, channels)
        mean = generator.normal(size=channels) * self.mean_over_sigma
        names = [
            self.constant(
                f"{output}.weight", generator.uniform(0.5, 1.5, channels) * generator.choice([-1, 1], channels)
            ),
            self.constant(f"{output}.bias", generator.normal(size=channels)),
            self.constant(f"{output}.mean", mean),
            self.constant(f"{output}.var", var),
        ]
        return self.add("BatchNormalization", [x, *names], output, epsilon=eps)

    def model(self, output: str, shape: list[Any], *, opset: int = 17) -> ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(output, kind, None)],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def random_network(seed: int, *, dtype: Any = np.float32, mean_over_sigma: float = 1.0) -> ModelProto:
    """Convolutions (grouped, strided), a transposed one, pooling and a Gemm, each followed by batch normalization."""
    build = Builder(seed, dtype=dtype, mean_over_sigma=mean_over_sigma)
    normal = build.generator.normal
    first, second = (int(size) for size in build.generator.choice([4, 6, 8], 2))
    weight = build.constant("conv1.weight", normal(size=(first, 3, 3, 3)) / 5)
    build.add("Conv", ["x", weight], "conv1", pads=[1, 1, 1, 1], strides=[2, 2])
    build.normalization("conv1", first, "bn1")
    build.add("Relu", ["bn1"], "relu1")
    weight = build.constant("conv2.weight", normal(size=(2 * first, first // 2, 3, 3)) / 4)
    bias = build.constant("conv2.bias", normal(size=2 * first))
    build.add("Conv", ["relu1", weight, bias], "conv2", group=2, auto_pad="SAME_UPPER")
    build.normalization("conv2", 2 * first, "bn2", eps=1e-3)
    build.add("HardSwish", ["bn2"], "act2")
    weight = build.constant("up.weight", normal(size=(2 * first, second, 2, 2)) / 4)
    build.add("ConvTranspose", ["act2", weight], "up", strides=[2, 2])
    build.normalization("up", second, "bn3")
    build.add("Sigmoid", ["bn3"], "act3")
    build.add("GlobalAveragePool", ["act3"], "pooled")
    build.add("Flatten", ["pooled"], "flat")
    weight = build.constant("fc.weight", normal(size=(5, second)))
    bias = build.constant("fc.bias", normal(size=5))
    build.add("Gemm", ["flat", weight, bias], "fc", transB=1)
    build.normalization("fc", 5, "bn4")
    build.add("Softmax", ["bn4"], "y")
    return build.model("y", ["n", 3, "h", "w"])


def constants(model: ModelProto) -> dict[str, TensorProto]:
    """Initializers and the tensors of Constant nodes, by name."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = node.attribute[0].t
    return found


def fold(model: ModelProto) -> ModelProto:
    """Every batch normalization whose input is a convolution, transposed or not, or a Gemm, folded in float64."""
    folded = ModelProto()
    folded.CopyFrom(model)
    producers = {node.output[0]: node for node in folded.graph.node}
    for node in list(folded.graph.node):
        if node.op_type == "BatchNormalization" and producers[node.input[0]].op_type in LINEAR:
            _fold_one(folded, producers[node.input[0]], node)
            folded.graph.node.remove(node)
    return folded


def _fold_one(model: ModelProto, linear: NodeProto, norm: NodeProto) -> None:
    tensors = {name: numpy_helper.to_array(tensor) for name, tensor in constants(model).items()}
    gamma, beta, mean, var = (tensors[name].astype(np.float64) for name in norm.input[1:5])
    eps = next(attribute.f for attribute in norm.attribute if attribute.name == "epsilon")
    scale = gamma / np.sqrt(var + eps)
    weight = tensors[linear.input[1]]
    bias = tensors[linear.input[2]].astype(np.float64) if len(linear.input) > 2 else np.zeros_like(mean)
    axis = 1 if linear.op_type == "ConvTranspose" else 0
    scaled = weight.astype(np.float64) * scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
    model.graph.initializer.extend(
        numpy_helper.from_array(values.astype(weight.dtype), f"{norm.output[0]}.folded_{role}")
        for role, values in (("weight", scaled), ("bias", scale * (bias - mean) + beta))
    )
    del linear.input[1:]
    linear.input.extend(f"{norm.output[0]}.folded_{role}" for role in ("weight", "bias"))
    linear.output[0] = norm.output[0]


def change(model: ModelProto, name: str, edit: Callable[[Array], Array]) -> None:
    """Replace one initializer."""
    tensor = constants(model)[name]
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(edit(values.copy()).astype(values.dtype), tensor.name))


def scale_channel(output: str, *, axis: int = 0, channel: int = 1) -> Mutation:
    def edit(values: Array) -> Array:
        np.moveaxis(values, axis, 0)[channel] *= 1.01
        return values

    return lambda model: change(model, f"{output}.folded_weight", edit)


def swap_channels(output: str, *, axis: int = 0) -> Mutation:
    def mutate(model: ModelProto) -> None:
        change(model, f"{output}.folded_weight", lambda values: _swapped(values, axis))
        change(model, f"{output}.folded_bias", lambda values: _swapped(values, 0))

    return mutate


def drop_bias(output: str, *, channel: int = 0) -> Mutation:
    def edit(values: Array) -> Array:
        values[channel] = 0
        return values

    return lambda model: change(model, f"{output}.folded_bias", edit)


def _swapped(values: Array, axis: int) -> Array:
    order = list(range(values.shape[axis]))
    order[0], order[1] = 1, 0
    return values.take(order, axis)
