"""The networks that the inference benchmarks serve: a tiny perceptron and one of ResNet-18's shape, random weights."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

TINY_INPUTS = 64
IMAGE_SHAPE = (3, 224, 224)


@dataclass(slots=True)
class _Graph:
    """Nodes in order and their weights; every method adds a layer and returns the name of its output."""

    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = (self.random.standard_normal(shape) / prod(shape[1:]) ** 0.5).astype(np.float32)
        return name

    def convolution(self, x: str, inputs: int, outputs: int, *, side: int, stride: int) -> str:
        attributes = {"pads": [side // 2] * 4, "strides": [stride, stride], "kernel_shape": [side, side]}
        return self.add("Conv", [x, self.weight(outputs, inputs, side, side), self.weight(outputs)], **attributes)

    def block(self, x: str, inputs: int, outputs: int, *, stride: int) -> str:
        inner = self.add("Relu", [self.convolution(x, inputs, outputs, side=3, stride=stride)])
        inner = self.convolution(inner, outputs, outputs, side=3, stride=1)
        straight = x if inputs == outputs else self.convolution(x, inputs, outputs, side=1, stride=stride)
        return self.add("Relu", [self.add("Add", [inner, straight])])

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        return self.add("Gemm", [x, self.weight(outputs, inputs), self.weight(outputs)], transB=1)

    def to_bytes(self, shape: tuple[int, ...], output: str, outputs: int) -> bytes:
        """An ONNX file with the input `x` (N, *shape) and the output `y` (N, outputs)."""
        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        graph = helper.make_graph(
            self.nodes,
            "benchmark",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", outputs])],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        return bytes(model.SerializeToString())


def perceptron(*, hidden: int = 64, layers: int = 1) -> bytes:
    """64 -> hidden (`layers` times) -> 10, relu between."""
    graph, x, width = _Graph(), "x", TINY_INPUTS
    for _ in range(layers):
        x, width = graph.add("Relu", [graph.linear(x, width, hidden)]), hidden
    return graph.to_bytes((TINY_INPUTS,), graph.linear(x, width, 10), 10)


def residual_network() -> bytes:
    """ResNet-18's convolutions, its normalizations folded away, as a service would run it."""
    graph = _Graph()
    x = graph.add("Relu", [graph.convolution("x", 3, 64, side=7, stride=2)])
    x = graph.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inputs = 64
    for outputs in (64, 128, 256, 512):
        x = graph.block(x, inputs, outputs, stride=1 if outputs == inputs else 2)
        x = graph.block(x, outputs, outputs, stride=1)
        inputs = outputs
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])
    return graph.to_bytes(IMAGE_SHAPE, graph.linear(x, 512, 1000), 1000)
