"""One attempt to fold one seed: against the flow of the graph, then with it, whole or its multiplication alone."""

import numpy as np

from normcore.folding.affine import Affine
from normcore.folding.filters import Exact
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import along
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.options import ZeroPadding
from normcore.folding.onnx.outcome import Outcome, name_of
from normcore.folding.onnx.refusal import Refusal, ShiftRefusal
from normcore.folding.onnx.rounding import Stored, store
from normcore.folding.onnx.seeds import Seed
from normcore.folding.onnx.walk import Walk
from normcore.folding.report import Direction


def fold_backward(graph: Graph, seed: Seed) -> Outcome:
    """Fold a seed into what stands before it. Raises Refusal, and nothing has changed then."""
    demand = seed.demand(graph)
    walk = Walk(graph)
    try:
        walk.pull(seed.input(graph), seed.nodes[0], demand)
    except ShiftRefusal:
        return _leave_shift_behind(graph, seed, demand)
    _check_growth(walk, len(seed.nodes))
    outcome = _describe(graph, walk, seed, "backward", walk.path[::-1] + seed.pattern(graph))
    walk.write()
    seed.replace(graph)
    return outcome


def fold_forward(graph: Graph, seed: Seed, *, zero_padding: ZeroPadding, cross_activations: bool) -> Outcome:
    """Fold a seed into everything that reads it. Raises Refusal, and nothing has changed then."""
    demand = seed.demand(graph)
    walk = Walk(graph, padding=zero_padding)
    try:
        walk.push(seed.output(graph), demand)
    except ShiftRefusal:
        if zero_padding not in ("auto", "offset"):
            raise
        return _leave_shift_before(graph, seed, demand, cross_activations=cross_activations)
    if walk.option is None:
        _check_growth(walk, len(seed.nodes))
    _check_digits(graph, seed, walk)
    outcome = _describe(graph, walk, seed, "forward", seed.pattern(graph) + walk.path, option=walk.option)
    walk.write()
    seed.remove(graph)
    return outcome


def fold_into_affine(graph: Graph, seed: Seed) -> Outcome:
    """Make a batch norm one Mul and one Add. Raises Refusal."""
    demand = seed.demand(graph)
    if (np.abs(demand.affine.scale) > 1).any():
        _check_range(graph, seed)
    parts = [("Mul", demand.affine.scale), ("Add", demand.affine.shift)]
    stored = [(operator, _constant(graph, seed, demand, vector)) for operator, vector in parts]
    pattern, output = " -> ".join(seed.pattern(graph)), seed.output(graph)
    chain = [
        (operator, graph.store(constant.array, instead_of="", fallback=f"{output}.{_ROLES[operator]}"))
        for operator, constant in stored
    ]
    made = seed.substitute(graph, chain)
    return Outcome(
        direction="in place",
        pattern=pattern,
        rules=("affine",),
        formulas=("y = scale x + shift",),
        into=tuple(name_of(graph, index) for index in made),
        residual=max(constant.residual for _, constant in stored),
        option="affine",
    )


_ROLES = {"Mul": "scale", "Add": "shift"}


def _leave_shift_before(graph: Graph, seed: Seed, demand: Demand, *, cross_activations: bool) -> Outcome:
    """The addition stays, the multiplication goes on: scale x + shift = scale (x + shift / scale)."""
    if not demand.affine.scale.all():
        channel = int(np.argmin(np.abs(demand.affine.scale)))
        raise Refusal(f"the shift cannot be left before the scale, which is 0 in channel {channel}")
    walk = Walk(graph, crosses_activations=cross_activations)
    walk.push(seed.output(graph), demand.mapped(Affine(demand.affine.scale, np.zeros(demand.channels))))
    _check_growth(walk, len(seed.nodes) - 1)
    _check_digits(graph, seed, walk)
    offset = _constant(graph, seed, demand, demand.affine.shift / demand.affine.scale)
    _check_range(graph, seed)
    outcome = _describe(graph, walk, seed, "forward", seed.pattern(graph) + walk.path, option="offset", stored=offset)
    walk.write()
    vector = graph.store(offset.array, instead_of="", fallback=f"{seed.output(graph)}.offset")
    graph.rename_changed(seed.output(graph))
    seed.substitute(graph, [("Add", vector)])
    return outcome


def _leave_shift_behind(graph: Graph, seed: Seed, demand: Demand) -> Outcome:
    """The multiplication goes on, the addition stays where the whole map was."""
    walk = Walk(graph)
    walk.pull(seed.input(graph), seed.nodes[0], demand.mapped(Affine(demand.affine.scale, np.zeros(demand.channels))))
    _check_growth(walk, len(seed.nodes) - 1)
    shift = _constant(graph, seed, demand, demand.affine.shift)
    _check_range(graph, seed)
    outcome = _describe(
        graph, walk, seed, "backward", walk.path[::-1] + seed.pattern(graph), option="offset", stored=shift
    )
    walk.write()
    vector = graph.store(shift.array, instead_of="", fallback=f"{seed.output(graph)}.shift")
    seed.substitute(graph, [("Add", vector)])
    return outcome


def _constant(graph: Graph, seed: Seed, demand: Demand, vector: Exact) -> Stored:
    """A vector as an operand beside the seed's input. Raises Refusal."""
    name = seed.input(graph)
    dtype, rank = graph.dtype(name), demand.rank
    if dtype is None or rank is None:
        raise Refusal(f"the file leaves the rank or the datatype of {name!r} free")
    return store(along(vector, axis=demand.axis, rank=rank), dtype, "shift")


def _check_range(graph: Graph, seed: Seed) -> None:
    if graph.dtype(seed.input(graph)) == np.float16:
        raise Refusal("in float16 the multiplication and the addition could overflow one without the other")


def _check_digits(graph: Graph, seed: Seed, walk: Walk) -> None:
    """A map of float64 may bring out digits that its input would lose in float32."""
    if graph.dtype(seed.input(graph)) != np.float64:
        return
    for edit in walk.edits:
        if graph.dtype(graph.node(edit.index).input[0]) != np.float64:
            raise Refusal(f"{label(graph.node(edit.index))} reads less than the float64 that it is computed in")


def _check_growth(walk: Walk, removed: int) -> None:
    if walk.inserted > removed:
        raise Refusal(f"the graph would grow by {walk.inserted - removed} nodes")


def _describe(
    graph: Graph,
    walk: Walk,
    seed: Seed,
    direction: Direction,
    path: list[str],
    *,
    option: str | None = None,
    stored: Stored | None = None,
) -> Outcome:
    rules = tuple(dict.fromkeys(edit.rule for edit in walk.edits))
    return Outcome(
        direction="merge" if rules == ("merge",) else direction,
        pattern=" -> ".join(path),
        rules=rules,
        formulas=tuple(dict.fromkeys(edit.formula for edit in walk.edits)),
        into=tuple(name_of(graph, edit.index) for edit in walk.edits),
        residual=max(walk.residual, stored.residual if stored is not None else 0.0),
        option=option,
    )


__all__ = ["fold_backward", "fold_forward", "fold_into_affine"]
