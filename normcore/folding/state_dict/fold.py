"""Fold a state_dict: plan, write, and where the class is known, prove."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from normcore.checkpoints.safetensors_writer import Computed, write_safetensors
from normcore.checkpoints.tensors import Tensor, TensorFile, TensorLimits
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.report import TensorHash
from normcore.folding.state_dict.loader import loader_source
from normcore.folding.state_dict.modules import Linear
from normcore.folding.state_dict.options import StateDictOptions
from normcore.folding.state_dict.proof import prove
from normcore.folding.state_dict.report import Change, Form, Pairing, StateDictPlan, StateDictReport
from normcore.folding.state_dict.rewrite import FORMULAS, Baking, Fold, Rewrite, bake, rewrite
from normcore.folding.state_dict.study import Study, refuse, study

Progress = Callable[[str, int, int], None]

MANIFEST_KEY = "normserve.manifest"
"""Where the header of a folded file says what was done to it."""

_DEFAULT_LIMITS = TensorLimits()
_DEFAULT_OPTIONS = StateDictOptions()
_STEPS = ("study", "write", "verify")
_NORM_TYPES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "FrozenBatchNorm2d")


def plan_state_dict(
    path: Path, *, limits: TensorLimits = _DEFAULT_LIMITS, options: StateDictOptions = _DEFAULT_OPTIONS
) -> StateDictPlan:
    """Every batch norm of a checkpoint without a graph: its standing, the evidence, and what would settle it.

    What is planned as foldable has been computed in full, so that a fold with the same options does it.

    Args:
        path: a safetensors file or a PyTorch checkpoint (zip format) of any origin.
        limits: what the file may declare.
        options: as for `fold_state_dict`.

    Raises:
        CheckpointError: the file is not usable.
        FoldError: an option cannot be honoured.
    """
    known = study(path, limits=limits, options=options)
    entries = dict(known.entries)
    with path.open("rb") as file:
        problems = _rehearse(file, known.source, known.folds, form=options.form)
    for name, reason in problems.items():
        entries[name] = refuse(entries[name], reason)
    return StateDictPlan(
        contents=known.contents,
        entries=tuple(entries.values()),
        architecture=options.architecture,
        notes=_notes(known, folded=len(known.folds) - len(problems)),
    )


def fold_state_dict(
    source: Path,
    target: Path,
    *,
    limits: TensorLimits = _DEFAULT_LIMITS,
    options: StateDictOptions = _DEFAULT_OPTIONS,
    progress: Progress | None = None,
) -> StateDictReport:
    """Fold a checkpoint without a graph into a safetensors file.

    What a known class or the caller vouches for is folded; what is `assumed` only on request and with an eps;
    what is `ambiguous` never. Tensors that stay are copied from file to file.

    Args:
        source: a safetensors file or a PyTorch checkpoint (zip format) of any origin.
        target: where the folded file goes; it appears at once or not at all, and not where nothing changes.
        limits: what the source may declare.
        options: what to fold and how.
        progress: called with a step's name, how many steps are done and how many there are.

    Raises:
        CheckpointError: the source is not usable.
        FoldError: an option cannot be honoured.
    """
    report_progress = progress or (lambda step, done, total: None)
    total = len(_STEPS) if options.architecture else len(_STEPS) - 1
    report_progress("study", 0, total)
    known = study(source, limits=limits, options=options)
    report_progress("write", 1, total)
    work = _Work(known, options, limits)
    unproven = target.with_name(f"{target.name}.{os.getpid()}.unproven")
    try:
        work.write(unproven)
        proof = None
        if known.architecture is not None and work.rewrites:
            report_progress("verify", 2, total)
            folds = [each.fold for each in work.rewrites.values()]
            proof = prove(known.architecture, known.source, unproven, folds, prefix=known.prefix, form=options.form)
        is_written = work.has_changes and (proof is None or proof.verdict == "equivalent")
        if is_written:
            unproven.replace(target)
    finally:
        unproven.unlink(missing_ok=True)
    report_progress("done", total, total)
    return StateDictReport(
        form=options.form,
        contents=known.contents,
        entries=tuple(work.entry(name, is_written=is_written) for name in known.entries),
        architecture=options.architecture,
        written=is_written,
        manifest=work.changes() if is_written else (),
        removed=tuple(work.removed) if is_written else (),
        proof=proof,
        loader=loader_source() if is_written and options.form == "deploy" else None,
        notes=(*_notes(known, folded=len(work.rewrites)), *work.notes),
    )


class _Work:
    """One fold on its way into a file."""

    def __init__(self, known: Study, options: StateDictOptions, limits: TensorLimits) -> None:
        self._known = known
        self._limits = limits
        self._options = options
        self._folds = dict(known.folds)
        self._refused: dict[str, Pairing] = {}
        self._baked: dict[str, Baking] = {}
        self.rewrites: dict[str, Rewrite] = {}
        self.has_changes = False
        self.notes: list[str] = []

    def write(self, target: Path) -> None:
        """Write what can be folded; a fold that turns out to be impossible is taken back, with the reason."""
        try:
            self._write(target)
        except Refusal:
            with self._known.source.path.open("rb") as file:
                problems = _rehearse(file, self._known.source, self._folds, form=self._options.form)
            for name, reason in problems.items():
                self._refused[name] = refuse(self._known.entries[name], reason)
                del self._folds[name]
            self._write(target)

    def _write(self, target: Path) -> None:
        source = self._known.source
        with source.path.open("rb") as file:
            self.rewrites = {
                name: rewrite(file, source, fold, form=self._options.form) for name, fold in self._folds.items()
            }
            tensors: dict[str, Tensor | Computed] = dict(source.tensors)
            if self._options.bake:
                self._bake(file, tensors)
        for each in self.rewrites.values():
            for key in each.removed:
                del tensors[key]
            tensors |= each.tensors
        self.has_changes = bool(self.rewrites or self._baked)
        if self.has_changes:
            limit = self._limits.max_header_bytes
            write_safetensors(source.path, target, tensors, metadata=self._metadata, max_header_bytes=limit)

    def _bake(self, file: BinaryIO, tensors: dict[str, Tensor | Computed]) -> None:
        """The weights that no fold has baked already."""
        taken = {fold.linear.name for fold in self._folds.values()}
        for name, linear in self._known.modules.linears.items():
            if linear.recipe == "plain" or linear.problem or name in taken:
                continue
            try:
                baking = bake(file, self._known.source, linear)
            except Refusal as refusal:
                self.notes.append(f"{name} is not baked: {refusal}")
                continue
            for part in linear.parts:
                del tensors[part]
            tensors[linear.weight] = baking.weight
            self._baked[linear.weight] = baking

    @property
    def removed(self) -> list[str]:
        gone = [key for each in self.rewrites.values() for key in each.removed]
        return gone + [part for each in self._baked.values() for part in each.linear.parts]

    def changes(self) -> tuple[Change, ...]:
        """Every tensor that is new or changed."""
        found = []
        for each in self.rewrites.values():
            hashes = each.ledger.after
            found += [Change(key, each.sources(key), each.fold.eps, _digest(hashes, key)) for key in each.tensors]
        for key, baking in self._baked.items():
            found.append(Change(key, baking.linear.parts, None, _digest(baking.ledger.after, key)))
        return tuple(found)

    def entry(self, name: str, *, is_written: bool) -> Pairing:
        entry = self._refused.get(name, self._known.entries[name])
        if name not in self.rewrites:
            return entry
        each = self.rewrites[name]
        if not is_written:
            return replace(entry, status="withdrawn", reason="its proof failed")
        operator = {"conv": "Conv", "conv_transpose": "ConvTranspose", "linear": "Linear"}[each.fold.kind]
        return replace(
            entry,
            status="folded",
            pattern=f"{operator} -> BatchNorm",
            rule=each.fold.kind,
            formula=FORMULAS[self._options.form],
            residual=each.ledger.residual,
            before=tuple(each.ledger.before.values()),
            after=tuple(each.ledger.after.values()),
        )

    def _plain_now(self) -> list[Linear]:
        """Operators whose reparametrization went, by a fold or by request."""
        linears = [each.fold.linear for each in self.rewrites.values() if each.fold.linear.weight in each.tensors]
        return [linear for linear in linears if linear.recipe != "plain"] + [
            baking.linear for baking in self._baked.values()
        ]

    def _metadata(self) -> Mapping[str, str]:
        prefix = self._known.prefix
        folds = [
            {
                "norm": each.fold.norm.name.removeprefix(prefix),
                "linear": each.fold.linear.name.removeprefix(prefix),
                "kind": each.fold.kind,
                "channels": each.fold.norm.num_features,
                "eps": each.fold.eps,
                "norm_types": _NORM_TYPES,
            }
            for each in self.rewrites.values()
        ]
        manifest: dict[str, Any] = {
            "form": self._options.form,
            "prefix": prefix,
            "folds": folds,
            "baked": [linear.name.removeprefix(prefix) for linear in self._plain_now()],
            "changes": [
                {"key": change.key, "old_keys": change.old_keys, "eps": change.eps, "sha256": change.sha256}
                for change in self.changes()
            ],
        }
        return {"format": "pt", MANIFEST_KEY: json.dumps(manifest)}


def _digest(hashes: Mapping[str, TensorHash], key: str) -> str:
    """Zeros of the same length before the tensor is written, when the header's length has to be known."""
    return hashes[key].sha256 if key in hashes else "0" * 64


def _rehearse(file: BinaryIO, source: TensorFile, folds: Mapping[str, Fold], *, form: Form) -> dict[str, str]:
    """Compute everything and keep nothing; by batch norm, why its fold is impossible."""
    problems = {}
    for name, fold in folds.items():
        try:
            for tensor in rewrite(file, source, fold, form=form).tensors.values():
                for _ in tensor.blocks(file):
                    pass
        except Refusal as refusal:
            problems[name] = str(refusal)
    return problems


def _notes(known: Study, *, folded: int) -> tuple[str, ...]:
    notes = [*known.source.notes]
    if known.source.other:
        notes.append(f"other groups of the file are left out: {', '.join(known.source.other)}")
    if not folded:
        notes.append("nothing folds")
    assumed = _names(known.entries.values(), "assumed")
    if assumed and not folded:
        notes.append(f"{assumed} pairings rest on evidence alone; accept_assumed and eps fold them")
    if known.source.format == "safetensors" and known.architecture is None:
        notes.append(
            "safetensors files do not keep the order of registration, which is evidence in a PyTorch checkpoint"
        )
    return tuple(notes)


def _names(entries: Collection[Pairing], standing: str) -> int:
    return sum(entry.standing == standing for entry in entries)


__all__ = ["MANIFEST_KEY", "Progress", "fold_state_dict", "plan_state_dict"]
