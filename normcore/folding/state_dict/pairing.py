"""Pairing without a graph: what the names point to, and whether all evidence agrees."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from normcore.checkpoints.tensors import TensorFile
from normcore.errors import StatisticsError
from normcore.folding.affine import Affine, affine_of
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.state_dict.evidence import Family, Instance, judge, uniqueness
from normcore.folding.state_dict.modules import Modules, Norm, parent_of
from normcore.folding.state_dict.naming import IN_SEQUENCE, Counterpart, find_counterparts, template
from normcore.folding.state_dict.report import Candidate, Evidence, Kind, Pairing, Standing
from normcore.folding.state_dict.weights import Exact, read_exact

_SHOWN_CANDIDATES = 8
_SETTLES = "an ONNX export of the model, its architecture by name, or the pair itself as `pairs`"
_SETTLES_KIND = "the pair itself as `pairs` with its kind (conv, conv_transpose or linear), or an ONNX export"


def read_affine(file: BinaryIO, source: TensorFile, norm: Norm, *, eps: float) -> Affine:
    """The map of a batch norm. Raises Refusal."""
    if norm.problem:
        raise Refusal(norm.problem)
    ones = np.ones(norm.num_features)

    def vector(key: str | None, default: Exact) -> Exact:
        return default if key is None else read_exact(file, source.tensors[key])

    try:
        return affine_of(
            vector(norm.weight, ones),
            vector(norm.bias, 0 * ones),
            vector(norm.running_mean, ones),
            vector(norm.running_var, ones),
            eps=eps,
        )
    except StatisticsError as error:
        raise Refusal(f"its statistics are unusable: {error}") from None


class Pairings:
    """What can be said of each batch norm of one file."""

    def __init__(self, file: BinaryIO, source: TensorFile, modules: Modules) -> None:
        self._source = source
        self._modules = modules
        self._problems = {name: _problem(file, source, norm) for name, norm in modules.norms.items()}
        self._counterparts = {name: find_counterparts(name, modules.linears) for name in modules.norms}
        self._claims: dict[str, list[str]] = defaultdict(list)
        instances: dict[str, list[Instance]] = defaultdict(list)
        for name, counterparts in self._counterparts.items():
            for counterpart in counterparts:
                self._claims[counterpart.linear].append(name)
                if self._problems[name] is None:
                    instances[template(name, counterpart.linear)].append(self._instance(file, name, counterpart))
        self._families = {pattern: Family(members, modules) for pattern, members in instances.items()}
        self._by_outputs = _by_outputs(modules)

    def entry(self, name: str) -> Pairing:
        """Standing, evidence and candidates of one batch norm."""
        norm = self._modules.norms[name]
        candidates, total = self._candidates(norm)
        problem = self._problems[name]
        if problem is not None:
            return _entry(norm, "refused", candidates, reason=problem)
        counterparts = self._counterparts[name]
        if not counterparts:
            if not total:
                return _entry(norm, "kept", candidates, reason="no operator of the file has as many outputs")
            reason = f"its name points to no operator; {total} have a fitting shape"
            return _entry(norm, "ambiguous", candidates, reason=reason, settles=_SETTLES)
        return self._judged(norm, counterparts, candidates)

    def _judged(self, norm: Norm, counterparts: Sequence[Counterpart], candidates: tuple[Candidate, ...]) -> Pairing:
        family = self._families[template(norm.name, counterparts[0].linear)]
        instance = family.by_norm[norm.name]
        unique = uniqueness(self._claims, norm.name, [each.linear for each in counterparts])
        by_name = Evidence("rule", True, f"{counterparts[0].linear}: {counterparts[0].rule}")
        checks = judge(instance, family, self._modules, keeps_order=self._source.keeps_order)
        evidence = (by_name, unique, *checks)
        failed = [each for each in evidence if each.holds is False]
        if failed:
            reason = "; ".join(each.detail for each in failed)
            settles = _SETTLES_KIND if [each.check for each in failed] == ["kind"] else _SETTLES
            return _entry(norm, "ambiguous", candidates, reason=reason, settles=settles, evidence=evidence)
        kind: Kind = "linear" if len(instance.linear.shape) == 2 else "conv"
        return _entry(
            norm, "assumed", candidates, evidence=evidence, settles=_SETTLES, into=instance.linear.name, kind=kind
        )

    def _instance(self, file: BinaryIO, name: str, counterpart: Counterpart) -> Instance:
        norm = self._modules.norms[name]
        mean = read_exact(file, self._source.tensors[norm.running_mean])
        linear = self._modules.linears[counterpart.linear]
        return Instance(norm, linear, mean, is_in_sequence=counterpart.rule == IN_SEQUENCE)

    def _candidates(self, norm: Norm) -> tuple[tuple[Candidate, ...], int]:
        """The nearest operators with a fitting shape, and how many there are."""
        places = self._modules.positions
        own = places[norm.name]
        fitting = self._by_outputs.get(norm.num_features, [])
        middle = bisect_left(fitting, own, key=lambda name: places[name])
        near = fitting[max(middle - _SHOWN_CANDIDATES, 0) : middle + _SHOWN_CANDIDATES]
        near = sorted(near, key=lambda name: (abs(own - places[name]), name))[:_SHOWN_CANDIDATES]
        keeps_order = self._source.keeps_order
        return tuple(
            Candidate(
                key=name,
                shape=self._modules.linears[name].shape,
                parent=parent_of(name),
                distance=own - places[name] if keeps_order else None,
            )
            for name in near
        ), len(fitting)


def _problem(file: BinaryIO, source: TensorFile, norm: Norm) -> str | None:
    """Why a batch norm folds into nothing, whatever stands before it."""
    try:
        read_affine(file, source, norm, eps=1.0)
    except Refusal as refusal:
        return str(refusal)
    return None


def _by_outputs(modules: Modules) -> Mapping[int, list[str]]:
    """Operators by how many outputs they may have, in the file's order; square weights are listed once."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, linear in modules.linears.items():
        sizes = set(linear.shape[:1]) if len(linear.shape) == 2 else set(linear.shape[:2])
        for size in sizes:
            found[size].append(name)
    return found


def _entry(
    norm: Norm,
    standing: Standing,
    candidates: tuple[Candidate, ...],
    *,
    reason: str | None = None,
    settles: str | None = None,
    evidence: tuple[Evidence, ...] = (),
    into: str | None = None,
    kind: Kind | None = None,
) -> Pairing:
    return Pairing(
        normalization=norm.name,
        operator="BatchNorm",
        num_features=norm.num_features,
        status="kept",
        output=norm.name,
        into=into,
        reason=reason,
        standing=standing,
        kind=kind,
        evidence=evidence,
        candidates=candidates,
        settles=settles,
    )


__all__ = ["Pairings", "read_affine"]
