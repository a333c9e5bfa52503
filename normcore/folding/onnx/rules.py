"""All normalizations of a graph: what folds, folds, until nothing more does, and each gets its entry of the report."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Unpack

from onnx import ModelProto, NodeProto

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS, bodies, walk_graphs
from normcore.folding.onnx.attempt import Outcome, fold_backward, fold_forward, fold_into_affine, label_of
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.options import FoldOptions, ZeroPadding
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.seeds import BATCH_NORM, Seed, batch_norms, scalings
from normcore.folding.report import PlanEntry

_MAX_ROUNDS = 64
# fmt: off
_DATA_DEPENDENT = frozenset((
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "LRN", "LpNormalization",
    "MeanVarianceNormalization",
))
# fmt: on


def fold_graph(model: ModelProto, **options: Unpack[FoldOptions]) -> tuple[PlanEntry, ...]:
    """Fold a model in place; it is only changed where something folds."""
    exclude = frozenset(options.get("exclude", ()))
    graph = Graph(model, freeze_initializers=options.get("freeze_initializers", False), locked=exclude)
    folder = _Folder(graph, options, exclude)
    folder.fold()
    if options.get("affine", False):
        folder.make_affine()
    entries = folder.entries()
    if any(entry.status == "folded" for entry in entries):
        graph.commit()
    return entries


class _Folder:
    """Folds one graph."""

    def __init__(self, graph: Graph, options: FoldOptions, exclude: frozenset[str]) -> None:
        self._graph = graph
        self._exclude = exclude
        self._zero_padding: ZeroPadding = options.get("zero_padding", "auto")
        self._cross_activations = options.get("cross_activations", False)
        self._listed = list(_list(graph))
        self._entries = {index: entry for index, (_, entry) in enumerate(self._listed)}
        self._keys = {index: key for key, (index, entry) in enumerate(self._listed) if entry.operator == BATCH_NORM}
        self._backward: dict[int, str] = {}
        self._rows: dict[int, Seed] = {}

    def fold(self) -> None:
        """Everything backward first, which needs no choice; then forward; from the start after every success."""
        for _ in range(_MAX_ROUNDS):
            folded = sum(self._each(seeds, self._fold_backward) for seeds in (batch_norms, scalings))
            folded += sum(self._each(seeds, self._fold_forward) for seeds in (batch_norms, scalings))
            if not folded:
                return

    def make_affine(self) -> None:
        """Replace the batch norms that are left."""
        self._each(batch_norms, lambda seed, _: fold_into_affine(self._graph, seed))

    def entries(self) -> tuple[PlanEntry, ...]:
        """In the order of the graph."""
        order = sorted(self._entries, key=lambda key: (self._listed[key][0], key))
        return tuple(self._entries[key] for key in order if self._is_worth_telling(key))

    def _is_worth_telling(self, key: int) -> bool:
        """Not a lone factor that stays, nor a row that went into the fold of another normalization."""
        entry = self._entries[key]
        if key not in self._rows or entry.status != "kept" or entry.output in self._exclude:
            return True
        return len(self._rows[key].nodes) > 1 and all(index in self._graph for index in self._rows[key].nodes)

    def _each(self, seeds: Callable[[Graph], Iterable[Seed]], attempt: Callable[[Seed, int], Outcome]) -> int:
        """Attempt every seed; how many folded."""
        folded = 0
        for seed in list(seeds(self._graph)):
            if any(index not in self._graph for index in seed.nodes):
                continue  # it went into another one
            key = self._key(seed)
            if self._entries[key].output in self._exclude or any(map(self._graph.is_locked, seed.nodes)):
                self._entries[key] = replace(self._entries[key], reason="excluded by the caller")
                continue
            try:
                self._entries[key] = _folded(self._entries[key], attempt(seed, key))
                folded += 1
            except Refusal as refusal:
                self._entries[key] = replace(self._entries[key], reason=str(refusal))
        return folded

    def _key(self, seed: Seed) -> int:
        """Where the entry of a seed is; a row of elementwise operators gets one when it is first seen."""
        if seed.nodes[0] not in self._keys:
            key = self._keys[seed.nodes[0]] = len(self._listed)
            entry = _entry_of_row(self._graph, seed)
            self._listed.append((seed.nodes[0], entry))
            self._entries[key] = entry
            self._rows[key] = seed
        return self._keys[seed.nodes[0]]

    def _fold_backward(self, seed: Seed, key: int) -> Outcome:
        try:
            return fold_backward(self._graph, seed)
        except Refusal as refusal:
            self._backward[key] = str(refusal)
            raise

    def _fold_forward(self, seed: Seed, key: int) -> Outcome:
        seed.demand(self._graph)  # where that fails, one reason is enough
        try:
            return fold_forward(
                self._graph, seed, zero_padding=self._zero_padding, cross_activations=self._cross_activations
            )
        except Refusal as refusal:
            raise Refusal(f"{self._backward[key]}; forward: {refusal}") from None


def _list(graph: Graph) -> Iterator[tuple[int, PlanEntry]]:
    """Every normalization, with its place in the graph."""
    for index, node in graph.nodes():
        if _is_normalization(node):
            data_dependent = "its statistics are computed from the data at inference"
            yield index, _entry(graph, node, data_dependent if node.op_type in _DATA_DEPENDENT else "")
        for body in bodies(node):
            for inner in (inner for nested, _ in walk_graphs(body) for inner in nested.node):
                if _is_normalization(inner):
                    yield index, _entry(graph, inner, f"it is inside a subgraph of {label(node)}")


def _folded(entry: PlanEntry, outcome: Outcome) -> PlanEntry:
    return replace(
        entry,
        status="folded",
        pattern=outcome.pattern,
        rule=", ".join(outcome.rules),
        into=", ".join(outcome.into),
        formula="; ".join(outcome.formulas),
        residual=max(outcome.residual, entry.residual or 0.0),
        direction=outcome.direction,
        option=outcome.option,
        reason=None,
    )


def _entry(graph: Graph, norm: NodeProto, reason: str) -> PlanEntry:
    output = next((name for name in norm.output if name), "")
    shape = graph.shape(norm.input[1]) if len(norm.input) > 1 else None
    return PlanEntry(
        normalization=norm.name or output,
        operator=norm.op_type,
        num_features=shape[0] if shape is not None and len(shape) == 1 else None,
        status="kept",
        output=output,
        reason=reason,
    )


def _entry_of_row(graph: Graph, seed: Seed) -> PlanEntry:
    output = seed.output(graph)
    return PlanEntry(
        normalization=label_of(graph, seed.nodes[0]),
        operator=" -> ".join(seed.pattern(graph)),
        num_features=None,
        status="kept",
        output=output,
    )


def _is_normalization(node: NodeProto) -> bool:
    return node.domain in STANDARD_DOMAINS and (node.op_type == BATCH_NORM or node.op_type in _DATA_DEPENDENT)


__all__ = ["fold_graph"]
