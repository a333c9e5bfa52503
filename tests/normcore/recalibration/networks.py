"""Small networks with batch norms in the places that matter, and how to read and change their statistics."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from normcore.recalibration.batches import Batch
from tests.normcore.folding.builder import Net

Array = NDArray[Any]


def chain_and_branches() -> ModelProto:
    """Conv -> norm a -> relu, then two branches, norm b and conv -> norm c, whose sum goes through norm d."""
    net = Net()
    stem = net.op("Relu", net.norm(net.op("Conv", "x", net.weight(4, 3, 3, 3), pads=[1] * 4, output="a"), 4))
    left = net.norm(stem, 4, output="left")
    right = net.norm(net.op("Conv", stem, net.weight(4, 4, 1, 1), output="c"), 4, output="right")
    net.norm(net.op("Add", left, right, output="sum"), 4, output="y")
    return net.model({"x": ["N", 3, "H", "W"]}, "y")


def gemm(**attributes: Any) -> ModelProto:
    """Input (N, 3) -> Gemm -> batch norm."""
    net = Net()
    net.norm(net.op("Gemm", "x", net.weight(3, 2), output="hidden"), 2, output="y", **attributes)
    return net.model({"x": ["N", 3]}, "y")


def images(count: int, *, seed: int = 3, offset: float = 0.0, scale: float = 1.0) -> Batch:
    data = np.random.default_rng(seed).standard_normal((count, 3, 6, 5)) * scale + offset
    return {"x": data.astype(np.float32)}


def statistics(model: ModelProto) -> list[tuple[Array, Array]]:
    """Mean and variance of every batch norm, as they are stored, in the order of the graph."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    return [(tensors[node.input[3]], tensors[node.input[4]]) for node in norms]


def with_statistics(model: ModelProto, *, mean: float, var: float) -> ModelProto:
    """A copy in which every batch norm's statistics are these."""
    changed = ModelProto()
    changed.CopyFrom(model)
    roles: dict[str, float] = {}
    for node in changed.graph.node:
        if node.op_type == "BatchNormalization":
            roles |= {node.input[3]: mean, node.input[4]: var}
    constants = [node.attribute[0].t for node in changed.graph.node if node.op_type == "Constant"]
    named = [(tensor, tensor.name) for tensor in changed.graph.initializer]
    named += zip(constants, [node.output[0] for node in changed.graph.node if node.op_type == "Constant"], strict=True)
    for tensor, name in named:
        if name in roles:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, roles[name]), tensor.name))
    return changed
