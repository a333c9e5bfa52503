"""An ONNX network as its author would have written it in torch, for the folding that torch.fx does on modules.

Convolutions, linears and batch norms are modules of torch.nn, one for each set of constants: two nodes of one weight
are one module called twice. Every other node is one step of onnxruntime without optimizations.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from normcore.checkpoints.onnx_shapes import infer_types
from normcore.execution import open_session, run

Array = NDArray[Any]

_DEFAULT_EPS = float(np.float32(1e-5))
_CONVOLUTIONS: Mapping[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class FxNetwork:
    """A network in torch, and what fuse() makes of it."""

    def __init__(self, model: ModelProto) -> None:
        self._inputs = [info.name for info in model.graph.input]
        self._outputs = [info.name for info in model.graph.output]
        self.module = _Translation(model).module(self._inputs, self._outputs)

    def fuse(self) -> None:
        self.module = fuse(self.module, inplace=True, no_trace=True)  # type: ignore[assignment]  # it is a GraphModule

    def norms(self) -> int:
        modules = dict(self.module.named_modules())
        called = [modules[str(node.target)] for node in self.module.graph.nodes if node.op == "call_module"]
        return sum(isinstance(module, tuple(_NORMS.values())) for module in called)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            arrays = self.module(*(torch.from_numpy(feeds[name]) for name in self._inputs))
        return dict(zip(self._outputs, (array.numpy() for array in arrays), strict=True))


class _Step(nn.Module):
    """Any node: onnxruntime computes it."""

    def __init__(self, node: NodeProto, constants: Mapping[str, Array], model: ModelProto) -> None:
        super().__init__()
        self.node = node
        self.fed = [name for name in dict.fromkeys(node.input) if name and name not in constants]
        self.constants = {name: constants[name] for name in node.input if name in constants}
        self.model = model

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        arrays = dict(zip(self.fed, (operand.numpy() for operand in operands), strict=True))
        kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
        infos = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in arrays.items()]
        names = [name for name in self.node.output if name]
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph([self.node], "step", infos, [ValueInfoProto(name=name) for name in names], tensors)
        single = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        session = open_session(single.SerializeToString(), threads=1, optimization="none")
        return tuple(torch.from_numpy(array.copy()) for array in run(session, arrays, names, deadline_s=30))


class _Translation:
    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._constants = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
        self._types = infer_types(model).top
        self._root = nn.Module()
        self._named: dict[str, str] = {}
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}

    def module(self, inputs: list[str], outputs: list[str]) -> fx.GraphModule:
        self._values = {name: self._graph.placeholder(f"input_{index}") for index, name in enumerate(inputs)}
        for node in self._model.graph.node:
            self._translate(node)
        self._graph.output(tuple(self._values[name] for name in outputs))
        return fx.GraphModule(self._root.eval(), self._graph)

    def _translate(self, node: NodeProto) -> None:
        build = _MODULES.get(node.op_type)
        known = build(node, self._constants, self._rank(node)) if build else None
        operands = [name for name in dict.fromkeys(node.input) if name and name not in self._constants]
        module = known or _Step(node, self._constants, self._model)
        arguments = tuple(self._values[name] for name in operands)
        called = self._graph.call_module(self._register(node, module, is_shared=known is not None), arguments)
        outputs = [name for name in node.output if name]
        if known:
            self._values[outputs[0]] = called
            return
        for index, name in enumerate(outputs):
            self._values[name] = self._graph.call_function(operator.getitem, (called, index))

    def _register(self, node: NodeProto, module: nn.Module, *, is_shared: bool) -> str:
        key = f"{node.op_type} {list(node.input[1:])} {node.attribute}" if is_shared else node.output[0]
        if key not in self._named:
            self._named[key] = f"layer{len(self._named)}"
            self._root.add_module(self._named[key], module)
        return self._named[key]

    def _rank(self, node: NodeProto) -> int:
        found = self._types.get(node.input[0]) if node.input else None
        return len(found.shape) if found and found.shape else 0


def _convolution(node: NodeProto, constants: Mapping[str, Array], rank: int) -> nn.Module | None:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    axes = rank - 2
    pads = values.get("pads", [0] * 2 * axes)
    is_plain = values.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") and pads[:axes] == pads[axes:]
    if rank not in _CONVOLUTIONS or not is_plain or not all(name in constants for name in node.input[1:] if name):
        return None
    weight, bias = constants[node.input[1]], _optional(node, 2, constants)
    group = values.get("group", 1)
    sizes = {"stride": values.get("strides"), "dilation": values.get("dilations")}
    module = _CONVOLUTIONS[rank](
        weight.shape[1] * group,
        weight.shape[0],
        weight.shape[2:],
        padding=tuple(pads[:axes]),
        groups=group,
        bias=bias is not None,
        **{name: tuple(size) for name, size in sizes.items() if size},
    )
    return _loaded(module, weight=weight, bias=bias)


def _norm(node: NodeProto, constants: Mapping[str, Array], rank: int) -> nn.Module | None:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    is_known = rank in _NORMS and all(name in constants for name in node.input[1:])
    if not is_known or values.get("training_mode") or len(node.output) > 1:
        return None
    weight, bias, mean, var = (constants[name] for name in node.input[1:])
    module = _NORMS[rank](len(weight), eps=values.get("epsilon", _DEFAULT_EPS))
    return _loaded(module, weight=weight, bias=bias, running_mean=mean, running_var=var)


def _linear(node: NodeProto, constants: Mapping[str, Array], rank: int) -> nn.Module | None:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    weight, bias = constants.get(node.input[1]), _optional(node, 2, constants)
    is_plain = not values.get("transA") and values.get("alpha", 1) == values.get("beta", 1) == 1
    is_known = node.input[0] not in constants and weight is not None and weight.ndim == 2
    if weight is None or not (is_plain and is_known) or (len(node.input) > 2 and (bias is None or bias.ndim != 1)):
        return None
    weight = weight if values.get("transB") else weight.T
    if bias is not None and len(bias) != len(weight):
        return None
    return _loaded(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), weight=weight, bias=bias)


def _optional(node: NodeProto, index: int, constants: Mapping[str, Array]) -> Array | None:
    return constants.get(node.input[index]) if len(node.input) > index else None


def _loaded(module: nn.Module, **arrays: Array | None) -> nn.Module:
    given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items() if array is not None}
    module = module.to(next(iter(given.values())).dtype)
    module.load_state_dict(given, strict=False)
    return module.eval()


_MODULES: Mapping[str, Callable[[NodeProto, Mapping[str, Array], int], nn.Module | None]] = {
    "Conv": _convolution,
    "BatchNormalization": _norm,
    "Gemm": _linear,
    "MatMul": _linear,
}
