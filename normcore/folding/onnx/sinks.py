"""The table of operators that take a map per channel into their constants."""

from typing import Protocol

from normcore.folding.onnx.batch_norm import BatchNormRule
from normcore.folding.onnx.conv import ConvRule
from normcore.folding.onnx.conv_transpose import ConvTransposeRule
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.gemm import GemmRule
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.matmul import MatMulRule


class SinkRule(Protocol):
    """How one operator takes a map from either side. A check changes nothing; the edit it returns writes."""

    operators: frozenset[str]

    def check_backward(self, graph: Graph, index: int, demand: Demand) -> Edit:
        """Take a map of the output. Raises Refusal."""
        ...

    def check_forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Edit:
        """Take a map of one input. Raises Refusal."""
        ...


_RULES: tuple[SinkRule, ...] = (ConvRule(), ConvTransposeRule(), GemmRule(), MatMulRule(), BatchNormRule())
SINKS: dict[str, SinkRule] = {operator: rule for rule in _RULES for operator in rule.operators}

__all__ = ["SINKS", "SinkRule"]
