"""From a map per channel to the operators that can take it: against the flow of the graph, or with it.

A walk changes nothing. It collects what would be written, and either all of it is written or nothing.
"""

from dataclasses import dataclass, field

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS
from normcore.folding.onnx import elementwise
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.options import ZeroPadding
from normcore.folding.onnx.padded_conv import PADDED, check_padded
from normcore.folding.onnx.passing import PASSES
from normcore.folding.onnx.passing.activation import ActivationRule
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal
from normcore.folding.onnx.sinks import SINKS

_MAX_STEPS = 256
# fmt: off
_NONLINEAR = frozenset((
    "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Gelu", "Mish", "Swish", "Sigmoid",
    "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Softmax", "LogSoftmax", "Hardmax", "Clip", "Erf",
    "Exp", "Log", "Sqrt", "Abs", "Pow", "Sin", "Cos", "LpPool", "GlobalLpPool", "Max", "Min",
))
# fmt: on


@dataclass(slots=True)
class Walk:
    """What one fold would write.

    Attributes:
        edits: constants of the operators that take the map.
        dropped: elementwise nodes on the way that go into it, with the slot of what they compute on.
        changed: tensors between that have another value after the fold.
        path: operators on the way, in the order of the walk.
    """

    graph: Graph
    crosses_activations: bool = True
    padding: ZeroPadding = "auto"
    edits: list[Edit] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    _visited: set[int] = field(default_factory=set)

    @property
    def inserted(self) -> int:
        """By how many nodes the graph would grow, without what the fold itself removes."""
        return sum(edit.inserted for edit in self.edits) - len(self.dropped)

    @property
    def option(self) -> str | None:
        """Which way around zero padding was taken."""
        return self.padding if any(edit.rule in PADDED for edit in self.edits) else None

    @property
    def residual(self) -> float:
        return max((edit.residual for edit in self.edits), default=0.0)

    def pull(self, name: str, user: int, demand: Demand) -> None:
        """Move the map of a tensor into what makes it. Raises Refusal."""
        graph = self.graph
        index = graph.producer(name)
        subject = f"its input is {graph.origin(name)}" if not self.path else f"before it stands {graph.origin(name)}"
        if index is None:
            raise Refusal(f"{subject}, with no linear operator before it")
        node = graph.node(index)
        self._visit(index)
        operator = node.op_type if node.domain in STANDARD_DOMAINS else ""
        if operator in SINKS:
            graph.check_single_use(name, user=user)
            self._take(index, SINKS[operator].check_backward(graph, index, demand))
        elif operator in elementwise.OPERATORS and self._is_affine(index):
            graph.check_single_use(name, user=user)
            found = elementwise.read_elementwise(graph, index)
            affine = found.on(graph, demand.axis, demand.rank, channels=demand.channels)
            self._drop(index, found.slot)
            self.pull(node.input[found.slot], index, demand.mapped(demand.affine.after(affine)))
        elif operator in PASSES:
            wanted = PASSES[operator].backward(graph, index, name, demand)
            graph.check_single_use(name, user=user)
            self.path.append(operator)
            for slot, part in wanted:
                self.pull(node.input[slot], index, part)
        else:
            raise Refusal(self._why_not(name, operator))
        self.changed.append(name)

    def push(self, name: str, demand: Demand) -> None:
        """Move the map of a tensor into everything that reads it. Raises Refusal."""
        graph = self.graph
        if graph.is_output(name):
            raise Refusal(f"{name!r} is an output of the graph")
        sites = graph.consumers(name)
        if not sites:
            raise Refusal(f"nothing reads {name!r}")
        for index, slot in sites:
            if slot < 0:
                raise Refusal(f"a subgraph of {label(graph.node(index))} reads {name!r}")
            self._visit(index)
            self._push_into(index, slot, demand)

    def write(self) -> None:
        """Do it."""
        for edit in self.edits:
            edit.rewrite(self.graph)
        for name in self.changed:
            self.graph.rename_changed(name)
        for index, slot in self.dropped:
            self.graph.bypass(index, slot)

    def _push_into(self, index: int, slot: int, demand: Demand) -> None:
        graph, node = self.graph, self.graph.node(index)
        operator = node.op_type if node.domain in STANDARD_DOMAINS else ""
        if operator in SINKS:
            self._take(index, self._check_sink(operator, index, slot, demand))
        elif operator in elementwise.OPERATORS and self._is_affine(index):
            found = elementwise.read_elementwise(graph, index)
            if found.slot != slot or len(node.output) != 1:
                raise Refusal(f"it is a constant of {label(node)}")
            affine = found.on(graph, demand.axis, demand.rank, channels=demand.channels)
            self._drop(index, slot)
            self.push(node.output[0], demand.mapped(affine.after(demand.affine)))
            self.changed.append(node.output[0])
        elif operator in PASSES:
            if isinstance(PASSES[operator], ActivationRule) and not self.crosses_activations:
                raise Refusal(f"{label(node)} is not linear")
            parts = PASSES[operator].forward(graph, index, slot, demand)
            self.path.append(operator)
            for place, part in parts:
                self.push(node.output[place], part)
                self.changed.append(node.output[place])
        elif operator in _NONLINEAR:
            raise Refusal(f"{label(node)} is not linear")
        else:
            raise Refusal(f"no rule folds into or through {label(node)}")

    def _check_sink(self, operator: str, index: int, slot: int, demand: Demand) -> Edit:
        try:
            return SINKS[operator].check_forward(self.graph, index, slot, demand)
        except ShiftRefusal:
            if operator != "Conv" or self.padding not in ("pad", "map"):
                raise
        return check_padded(self.graph, index, demand, option=self.padding)

    def _is_affine(self, index: int) -> bool:
        """Whether one operand is constant; what adds up two computed tensors passes a map on to both."""
        node = self.graph.node(index)
        return node.op_type in elementwise.SCALING or any(
            self.graph.producer(name) is None or self.graph.is_constant(name) for name in node.input
        )

    def _take(self, index: int, edit: Edit) -> None:
        self.path.append(self.graph.node(index).op_type)
        self.edits.append(edit)
        if edit.follow is not None:
            self._visit(edit.follow.index)

    def _drop(self, index: int, slot: int) -> None:
        self.path.append(self.graph.node(index).op_type)
        self.dropped.append((index, slot))

    def _visit(self, index: int) -> None:
        node = self.graph.node(index)
        if index in self._visited:
            raise Refusal(f"it reaches {label(node)} on two ways")
        if self.graph.is_locked(index):
            raise Refusal(f"{label(node)} is excluded by the caller")
        if len(self._visited) >= _MAX_STEPS:
            raise Refusal(f"more than {_MAX_STEPS} operators would have to change")
        self._visited.add(index)

    def _why_not(self, name: str, operator: str) -> str:
        origin = f"its input is produced by {self.graph.origin(name)}"
        if self.path:
            origin = f"before {self.path[-1]} stands {self.graph.origin(name)}"
        return f"{origin}, which is not linear" if operator in _NONLINEAR else f"{origin}, through which no rule folds"


__all__ = ["Refusal", "ShiftRefusal", "Walk"]
