"""Evaluates an ONNX graph in float64."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from normcore.errors import DeadlineError, NormcoreError
from normcore.folding.reference.double import to_double
from normcore.folding.reference.operators import OPERATORS

# What operators raise for graphs they cannot do; the evaluator has no base class for it.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_OLDEST_OPSET = 7  # before it, broadcasting was an attribute
_CHANGED = {"Scan": 9}  # operators that mean something else before this version


class NotEvaluableError(NormcoreError):
    """A graph that cannot be evaluated in float64; the message names the operator."""


class Reference:
    """A graph in float64, whatever its own float types.

    Versions of operators are honoured as they are: nothing is converted to a newer opset. Batch normalization is
    always evaluated in inference mode unless the node says `training_mode`.
    """

    def __init__(self, model: ModelProto) -> None:
        """Prepare the graph.

        Raises:
            NotEvaluableError: it holds an operator that cannot be evaluated or has no fixed value.
        """
        if model.functions:
            model = inline_local_functions(model)
        _refuse(model)
        try:
            evaluator = ReferenceEvaluator(to_double(model), new_ops=OPERATORS)
        except _FAILURES as error:
            raise NotEvaluableError(f"the graph cannot be evaluated in float64: {_shorten(error)}") from error
        self._constants: dict[str, Any] = evaluator.rt_inits_
        self._nodes: list[OpRun] = evaluator.rt_nodes_
        self._outputs = [output.name for output in model.graph.output]
        self._implicit = [_outer_names(node) for node in model.graph.node]

    def with_constants(self, values: Mapping[str, NDArray[Any]]) -> "Reference":
        """The same graph with other values of some initializers, in double."""
        other = copy(self)
        other._constants = self._constants | dict(values)
        return other

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        names: Iterable[str] | None = None,
        *,
        deadline: float = float("inf"),
    ) -> dict[str, NDArray[Any]]:
        """Named tensors of the graph, outputs or intermediates; None for the outputs.

        Args:
            feeds: inputs by name; floats of any precision are taken as they are, in double.
            names: tensors to return; those that are inputs or initializers too.
            deadline: time.monotonic() after which no further node is evaluated.

        Raises:
            NotEvaluableError: an operator failed on these inputs.
            DeadlineError: the deadline has passed.
        """
        start = time.monotonic()
        wanted = list(self._outputs if names is None else names)
        steps = self._steps(wanted)
        left = Counter([*wanted, *(name for _, used in steps for name in used)])
        values: dict[str, Any] = {"": None, **self._constants}
        values.update({name: _as_double(array) for name, array in feeds.items()})
        with np.errstate(all="ignore"):
            for node, used in steps:
                if time.monotonic() > deadline:
                    raise DeadlineError("evaluation in float64", deadline_s=deadline - start)
                values.update(zip(node.output, _evaluate(node, values), strict=False))
                for name in used:
                    left[name] -= 1
                    if not left[name] and name not in self._constants:
                        values[name] = None
        return {name: _as_double(np.asarray(values[name])) for name in wanted}

    def _steps(self, wanted: Iterable[str]) -> list[tuple[OpRun, list[str]]]:
        """The nodes that the wanted tensors depend on, in order, with the names that each reads."""
        needed = set(wanted)
        steps = []
        for node, used in zip(reversed(self._nodes), reversed(self._implicit), strict=True):
            if needed.intersection(node.output):
                needed.update(used)
                steps.append((node, used))
        return steps[::-1]


def _evaluate(node: OpRun, values: dict[str, Any]) -> tuple[Any, ...]:
    inputs = [values[name] for name in node.input]
    context = {"context": values} if node.need_context() else {}
    try:
        outputs = node.run(*inputs, **context)  # type: ignore[no-untyped-call]  # onnx leaves OpRun.run untyped
    except _FAILURES as error:
        message = f"operator {node.op_type} ({node.output[0]}) cannot be evaluated in float64: {_shorten(error)}"
        raise NotEvaluableError(message) from error
    return tuple(outputs)


def _refuse(model: ModelProto) -> None:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), _OLDEST_OPSET)
    if opset < _OLDEST_OPSET:
        raise NotEvaluableError(f"opset {opset} cannot be evaluated in float64: the oldest one is {_OLDEST_OPSET}")
    for node in _all_nodes(model.graph.node):
        if node.op_type in _RANDOM:
            raise NotEvaluableError(f"operator {node.op_type} ({node.output[0]}) draws random numbers")
        if opset < _CHANGED.get(node.op_type, 0):
            raise NotEvaluableError(f"operator {node.op_type} of opset {opset} cannot be evaluated in float64")


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _outer_names(node: NodeProto) -> list[str]:
    """Names that a node reads, those of the enclosing graph that its subgraphs read included."""
    inner = {name for child in _all_nodes([node]) for name in child.input}
    for child in _all_nodes([node]):
        for attribute in child.attribute:
            inner.update(output.name for output in attribute.g.output)
    return [name for name in inner if name]


def _as_double(array: NDArray[Any]) -> NDArray[Any]:
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if is_float else array


def _shorten(error: BaseException) -> str:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return first_line if len(first_line) < 200 else first_line[:197] + "..."
