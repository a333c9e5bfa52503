"""One network in both precisions: its own, by onnxruntime, and float64."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from normcore import execution
from normcore.errors import DeadlineError
from normcore.execution import ExecutionError
from normcore.folding.comparison import is_float, largest
from normcore.folding.probes import Feeds
from normcore.folding.reference import NotEvaluableError, Reference

_NEARLY = 1e-3  # of the largest element

Arrays = dict[str, NDArray[Any]]


class Network:
    """A graph of which the same tensors, outputs or intermediates, are wanted from both evaluations."""

    def __init__(self, model: ModelProto, tensors: Sequence[str], *, threads: int) -> None:
        """Load the graph without any optimization.

        Raises:
            CheckpointError: onnxruntime cannot load it.
            NotEvaluableError: it cannot be evaluated in float64.
        """
        outputs = {output.name for output in model.graph.output}
        shown = ModelProto()
        shown.CopyFrom(model)
        shown.graph.output.extend(ValueInfoProto(name=name) for name in tensors if name not in outputs)
        self._tensors = list(tensors)
        self._session = execution.open_session(shown.SerializeToString(), threads=threads, optimization="none")
        self.reference = Reference(model)

    def run(self, feeds: Feeds, *, deadline: float) -> Arrays:
        """The tensors in the network's own precision.

        Raises:
            ExecutionError: the graph fails on these inputs.
            DeadlineError: time.monotonic() has reached the deadline.
        """
        left_s = max(0.0, deadline - time.monotonic())
        if not left_s:
            raise DeadlineError("run", deadline_s=left_s)
        arrays = execution.run(self._session, feeds, self._tensors, deadline_s=left_s)
        return dict(zip(self._tensors, arrays, strict=True))

    def evaluate(self, feeds: Feeds, *, deadline: float) -> Arrays:
        """The tensors in float64.

        Raises:
            NotEvaluableError: an operator fails in float64.
            DeadlineError: time.monotonic() has reached the deadline.
        """
        return self.reference.run(feeds, self._tensors, deadline=deadline)

    def agreeing(self, other: "Network", names: Sequence[str], feeds: Feeds, *, deadline: float) -> set[str]:
        """The tensors of these that are nearly the same in both networks, in float64.

        Raises:
            NotEvaluableError: an operator fails in float64.
            DeadlineError: time.monotonic() has reached the deadline.
        """
        mine = self.reference.run(feeds, names, deadline=deadline)
        theirs = other.reference.run(feeds, names, deadline=deadline)
        return {name for name in names if _agree(mine[name], theirs[name])}

    def refuses(self, feeds: Feeds, *, deadline: float) -> str | None:
        """Why inputs of these shapes are of no use, or None."""
        try:
            arrays = self.run(feeds, deadline=deadline)
            self.evaluate(feeds, deadline=deadline)
        except (ExecutionError, NotEvaluableError) as error:
            return str(error)
        empty = [name for name, array in arrays.items() if not array.size]
        return f"output {empty[0]} is empty" if empty else None


def _agree(left: NDArray[Any], right: NDArray[Any]) -> bool:
    if left.shape != right.shape or not (is_float(left) and is_float(right)):
        return False
    return bool(np.allclose(left, right, rtol=0.0, atol=_NEARLY * largest(left), equal_nan=True))
