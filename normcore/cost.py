"""Whether the time that a network takes is known from the shapes of its inputs."""

from onnx import ModelProto

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS

# fmt: off
_BY_SHAPE = frozenset((
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Exp", "Log", "Erf",
    "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
    "Softplus", "Softsign", "Softmax", "LogSoftmax", "Clip", "Min", "Max", "Sum", "Mean", "BatchNormalization",
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "LRN", "LpNormalization",
    "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "ReduceMean", "ReduceSum",
    "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze",
    "Concat", "Split", "Slice", "Gather", "Cast", "Identity", "Dropout", "Constant", "Shape", "DepthToSpace",
    "SpaceToDepth",
))
# fmt: on


def is_cost_known(model: ModelProto) -> bool:
    """Whether every operator takes a time, and makes a tensor of a size, that its input shapes determine.

    Control flow and operators that read a size out of a tensor (Loop, Expand, Range, Resize, ...) are not of that
    kind: a request of a harmless shape could keep them busy for ever.

    Args:
        model: from `load_onnx`.
    """
    return all(node.domain in STANDARD_DOMAINS and node.op_type in _BY_SHAPE for node in model.graph.node)


__all__ = ["is_cost_known"]
