"""All normalizations of a graph: what folds, folds, until nothing more does, and each gets its entry of the report."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Unpack, get_args

from onnx import ModelProto, NodeProto

from normcore.checkpoints.onnx_structure import STANDARD_DOMAINS, bodies, walk_graphs
from normcore.errors import ParameterError
from normcore.folding.onnx.attempt import fold_backward, fold_forward, fold_into_affine
from normcore.folding.onnx.baking import bake, computed_weights
from normcore.folding.onnx.batch_norm import OLDEST_OPSET
from normcore.folding.onnx.branches import is_pair, merge, pairs
from normcore.folding.onnx.gains import gains, move_gain
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.options import FoldOptions, ZeroPadding
from normcore.folding.onnx.outcome import Outcome, name_of
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
    """Fold a model in place; it is only changed where something folds.

    Raises:
        ParameterError: an option has a value that it does not know.
    """
    if options.get("zero_padding", "auto") not in get_args(ZeroPadding):
        raise ParameterError(
            "zero_padding",
            expected=f"one of {', '.join(get_args(ZeroPadding))}",
            received=repr(options["zero_padding"]),
        )
    graph = Graph(
        model, freeze_initializers=options.get("freeze_initializers", False), locked=options.get("exclude", ())
    )
    folder = _Folder(graph, options)
    folder.fold()
    entries = folder.entries()
    if any(entry.status == "folded" for entry in entries):
        graph.commit()
    return entries


class _Folder:
    """Folds one graph, and keeps the entry of every normalization."""

    def __init__(self, graph: Graph, options: FoldOptions) -> None:
        self._graph = graph
        self._options = options
        self._exclude = frozenset(options.get("exclude", ()))
        self._listed = list(_list(graph))
        self._entries = {key: entry for key, (_, _, entry) in enumerate(self._listed)}
        self._keys: dict[tuple[str, tuple[int, ...]], int] = {
            ("", (index,)): key for key, (index, is_own, _) in enumerate(self._listed) if is_own
        }
        self._refusals: dict[int, str] = {}
        self._rows: dict[int, tuple[int, ...]] = {}

    def fold(self) -> None:
        """Weights first; then everything backward, which needs no choice, then forward, until nothing more folds."""
        if self._graph.opset < OLDEST_OPSET:  # elementwise operators broadcast in other ways there
            self._seeds(batch_norms, self._fold_backward)
            return
        self._bake()
        for _ in range(_MAX_ROUNDS):
            folded = sum(self._seeds(seeds, self._fold_backward) for seeds in (batch_norms, scalings))
            folded += self._merge_branches()
            folded += sum(self._seeds(seeds, self._fold_forward) for seeds in (batch_norms, scalings))
            if not folded:
                break
        if self._options.get("move_gains", False):
            for gain in gains(self._graph):
                self._attempt(self._keys["", (gain.norm,)], (gain.norm,), partial(move_gain, self._graph, gain))
        if self._options.get("affine", False):
            self._seeds(batch_norms, lambda seed, _: fold_into_affine(self._graph, seed))

    def entries(self) -> tuple[PlanEntry, ...]:
        """In the order of the graph."""
        order = sorted(self._entries, key=lambda key: (self._listed[key][0], key))
        return tuple(self._entries[key] for key in order if self._is_worth_telling(key))

    def _is_worth_telling(self, key: int) -> bool:
        """Not a lone factor that stays, nor a row that went into the fold of another normalization."""
        entry = self._entries[key]
        if key not in self._rows or entry.status != "kept" or entry.output in self._exclude:
            return True
        return len(self._rows[key]) > 1 and all(index in self._graph for index in self._rows[key])

    def _attempt(self, key: int, nodes: tuple[int, ...], fold: Callable[[], Outcome]) -> bool:
        """Fold, unless the caller or a rule says no; whether it did."""
        entry = self._entries[key]
        if entry.output in self._exclude or any(map(self._graph.is_locked, nodes)):
            self._entries[key] = replace(entry, reason="excluded by the caller")
            return False
        try:
            self._entries[key] = _folded(entry, fold())
        except Refusal as refusal:
            if entry.status == "kept":
                self._entries[key] = replace(entry, reason=str(refusal))
            return False
        return True

    def _seeds(self, seeds: Callable[[Graph], Iterable[Seed]], fold: Callable[[Seed, int], Outcome]) -> int:
        """Attempt every seed; how many folded."""
        folded = 0
        for seed in list(seeds(self._graph)):
            if all(index in self._graph for index in seed.nodes):  # else it went into another one
                key = self._key("", seed.nodes, seed.pattern(self._graph), seed.output(self._graph))
                folded += self._attempt(key, seed.nodes, partial(fold, seed, key))
        return folded

    def _bake(self) -> None:
        for index, weight in list(computed_weights(self._graph)):
            if self._graph.producer(weight) is None:
                continue  # shared, and stored by now
            before = self._standing()
            node = self._graph.node(index)
            key = self._key("bake", (index,), [f"weight of {node.op_type}"], node.output[0])
            if self._attempt(key, (index,), partial(bake, self._graph, index, weight)):
                for other in before - self._standing():  # a norm of the weight, which is known by its own entry
                    self._entries[other] = replace(self._entries[key], **_identity(self._entries[other]))

    def _merge_branches(self) -> int:
        folded = 0
        for pair in list(pairs(self._graph)):
            if is_pair(self._graph, pair):
                gone = self._graph.node(pair.gone)
                kind = "" if gone.op_type == BATCH_NORM else "branch"
                key = self._key(kind, (pair.gone,), [gone.op_type], gone.output[0])
                folded += self._attempt(key, (pair.gone,), partial(merge, self._graph, pair))
        return folded

    def _standing(self) -> set[int]:
        """Entries whose operators are still in the graph."""
        return {key for (_, nodes), key in self._keys.items() if nodes[0] in self._graph}

    def _key(self, kind: str, nodes: tuple[int, ...], operators: list[str], output: str) -> int:
        """Where an entry is; what is no operator of normalization gets one when it is first seen."""
        if (kind, nodes) not in self._keys:
            key = self._keys[kind, nodes] = len(self._listed)
            entry = PlanEntry(name_of(self._graph, nodes[0]), " -> ".join(operators), None, "kept", output)
            self._listed.append((nodes[0], True, entry))
            self._entries[key] = entry
            self._rows[key] = nodes
        return self._keys[kind, nodes]

    def _fold_backward(self, seed: Seed, key: int) -> Outcome:
        try:
            return fold_backward(self._graph, seed)
        except Refusal as refusal:
            self._refusals[key] = str(refusal)
            raise

    def _fold_forward(self, seed: Seed, key: int) -> Outcome:
        seed.demand(self._graph)  # where that fails, one reason is enough
        try:
            return fold_forward(
                self._graph,
                seed,
                zero_padding=self._options.get("zero_padding", "auto"),
                cross_activations=self._options.get("cross_activations", False),
            )
        except Refusal as refusal:
            before = self._refusals.get(key)  # none for a row that a fold of this round has made: the next one looks
            raise Refusal(f"{before}; forward: {refusal}" if before else str(refusal)) from None


def _list(graph: Graph) -> Iterator[tuple[int, bool, PlanEntry]]:
    """Every normalization, with its place in the graph, and whether it is a node of the graph itself."""
    for index, node in graph.nodes():
        if _is_normalization(node):
            data_dependent = "its statistics are computed from the data at inference"
            yield index, True, _entry(graph, node, data_dependent if node.op_type in _DATA_DEPENDENT else "")
        for body in bodies(node):
            for inner in (inner for nested, _ in walk_graphs(body) for inner in nested.node):
                if _is_normalization(inner):
                    yield index, False, _entry(graph, inner, f"it is inside a subgraph of {label(node)}")


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


def _identity(entry: PlanEntry) -> dict[str, Any]:
    """What an entry keeps when it went into the fold of another one."""
    names = ("normalization", "operator", "num_features", "output")
    return {name: getattr(entry, name) for name in names}


def _is_normalization(node: NodeProto) -> bool:
    return node.domain in STANDARD_DOMAINS and (node.op_type == BATCH_NORM or node.op_type in _DATA_DEPENDENT)


__all__ = ["fold_graph"]
