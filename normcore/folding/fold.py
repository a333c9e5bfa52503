"""Fold: rewrite a copy of the model, then let the verifier judge the two files and take back what it doubts."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import ModelProto

from normcore.checkpoints.files import write_file
from normcore.checkpoints.onnx import GraphLimits, load_onnx
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.rules import fold_normalizations
from normcore.folding.report import Certificate, FoldReport, PlanEntry
from normcore.folding.verify import ProbeOptions, certify

Progress = Callable[[str, int, int], None]

_STEPS = ("load", "fold", "write", "verify")


def fold_onnx(
    model: ModelProto, *, freeze_initializers: bool = False, exclude: Collection[str] = ()
) -> tuple[ModelProto, tuple[PlanEntry, ...]]:
    """A copy of the model with every batch norm folded for which a rule holds, and what became of each normalization.

    Names of tensors, inputs, outputs, opset and metadata stay; the number of nodes falls. All arithmetic is in
    float64 with one rounding at the end, whose size is the entry's `residual`.

    Args:
        model: from `load_onnx`; it is not changed.
        freeze_initializers: treat initializers that are also graph inputs as constants, and drop those inputs.
        exclude: output names of normalizations to leave alone.

    Returns:
        The folded model (a plain copy where nothing folds) and one entry per normalization, in the graph's order.
    """
    folded = ModelProto()
    folded.CopyFrom(model)
    graph = Graph(folded, freeze_initializers=freeze_initializers)
    entries = tuple(fold_normalizations(graph, exclude=exclude))
    if any(entry.status == "folded" for entry in entries):
        graph.commit()
        onnx.checker.check_model(folded)
    return folded, entries


def fold_checkpoint(
    source: Path,
    target: Path,
    *,
    limits: GraphLimits,
    freeze_initializers: bool = False,
    verify: ProbeOptions | None,
    progress: Progress | None = None,
) -> FoldReport:
    """Fold an ONNX file into another one, and prove the two equivalent.

    A fold that fails its proof is withdrawn and the rest is folded again, so that what is written at the end is
    either proven or reported as inconclusive. Where nothing folds, the target is the source, byte for byte.

    Args:
        source: an ONNX file of any origin.
        target: where the folded file goes; it appears at once or not at all.
        limits: what the source may be.
        freeze_initializers: see `fold_onnx`.
        verify: how to prove, all repetitions within its one deadline; None writes an unproven file.
        progress: called with a step's name, how many steps are done and how many there are.

    Raises:
        CheckpointError: the source is not usable.
    """
    report_progress = progress or (lambda step, done, total: None)
    total = len(_STEPS) if verify else len(_STEPS) - 1
    report_progress("load", 0, total)
    model = load_onnx(source, limits=limits)
    deadline = time.monotonic() + (verify.deadline_s if verify else 0.0)
    withdrawn: dict[str, str] = {}
    while True:
        report_progress("fold", 1, total)
        folded, entries = fold_onnx(model, freeze_initializers=freeze_initializers, exclude=withdrawn)
        outputs = [entry.output for entry in entries if entry.status == "folded"]
        report_progress("write", 2, total)
        write_file(target, folded.SerializeToString() if outputs else source.read_bytes())
        certificate = None
        if verify is not None and outputs:
            report_progress("verify", 3, total)
            certificate = certify(source, target, replace(verify, deadline_s=max(deadline - time.monotonic(), 0.0)))
        doubted = _doubted(outputs, certificate)
        if not doubted:
            break
        withdrawn |= doubted
    report_progress("done", total, total)
    return FoldReport(
        entries=tuple(_mark(entry, withdrawn) for entry in entries),
        nodes_before=len(model.graph.node),
        nodes_after=len(folded.graph.node),
        certificate=certificate,
        notes=_notes(model, folded, outputs, withdrawn),
    )


def _doubted(outputs: Collection[str], certificate: Certificate | None) -> dict[str, str]:
    """The folds to withdraw, with the reason: those that failed at their own region, else all of a wrong network."""
    if certificate is None:
        return {}
    failed = [region for region in certificate.regions if region.output in outputs and not region.equivalent]
    if failed:
        return {
            region.output: f"its proof failed: the result differs by {region.error:.3g} where the largest value is "
            f"{region.scale:.3g}"
            for region in failed
        }
    if certificate.verdict == "different":
        return dict.fromkeys(outputs, f"the proof of the whole network failed: {certificate.sentence}")
    return {}


def _mark(entry: PlanEntry, withdrawn: Mapping[str, str]) -> PlanEntry:
    if entry.output not in withdrawn:
        return entry
    return replace(entry, status="withdrawn", reason=withdrawn[entry.output])


def _notes(
    model: ModelProto, folded: ModelProto, outputs: Collection[str], withdrawn: Collection[str]
) -> tuple[str, ...]:
    notes = []
    if not outputs:
        notes.append("nothing was folded; the file is unchanged")
    if withdrawn:
        notes.append(f"{len(withdrawn)} folds were withdrawn because their proof failed")
    frozen = len(model.graph.input) - len(folded.graph.input)
    if frozen:
        notes.append(f"{frozen} initializers are no longer graph inputs: callers cannot override them any more")
    if folded.ir_version != model.ir_version:
        notes.append(
            f"ir_version rose from {model.ir_version} to {folded.ir_version}, where initializers need not be inputs"
        )
    return tuple(notes)


__all__ = ["Progress", "fold_checkpoint", "fold_onnx"]
