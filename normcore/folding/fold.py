"""Fold: rewrite a copy of the model, then let the verifier judge the two files and take back what it doubts."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from onnx import ModelProto, NodeProto

from normcore.checkpoints.files import write_file
from normcore.checkpoints.onnx import GraphLimits, load_onnx
from normcore.checkpoints.onnx_checker import check_model
from normcore.checkpoints.onnx_writer import serialize
from normcore.folding.evidence import describe_folds
from normcore.folding.onnx.options import FoldOptions
from normcore.folding.onnx.rules import fold_graph
from normcore.folding.report import FoldReport, PlanEntry
from normcore.folding.verify import ProbeOptions, certify
from normcore.folding.withdrawal import Trial, fold_what_is_proven

Progress = Callable[[str, int, int], None]

_STEPS = ("load", "fold", "write", "verify")


def fold_onnx(model: ModelProto, **options: Unpack[FoldOptions]) -> tuple[ModelProto, tuple[PlanEntry, ...]]:
    """A copy of the model with every batch norm folded for which a rule holds, and what became of each normalization.

    What is folded: batch norms, and rows of Mul, Add, Sub and Div by constants that scale channels (decomposed batch
    norms); backward into the operators that make their input, else forward into all that read their output. All
    arithmetic is in float64 with one rounding at the end, whose size is the entry's `residual`. A name means the same
    tensor before and after; inputs, outputs, opset and metadata stay; the number of nodes never rises by default.

    Args:
        model: from `load_onnx`; it is not changed.
        options: by keyword:
            freeze_initializers (False): treat initializers that are also graph inputs as constants, and drop those
            inputs.
            exclude (()): output names of normalizations to leave alone.
            zero_padding ("auto"): how a norm goes forward into a convolution that pads with zeros, which its shift
            would have to reach: `offset` leaves an Add of shift / scale before it, `pad` pads explicitly with
            -shift / scale, `map` adds a bias per position behind it (`pad` and `map` may add nodes and need a fixed
            size), `refuse` keeps the norm, `auto` is `offset`, which makes the smallest graph.
            cross_activations (False): move positive scales forward through Relu, LeakyRelu and PRelu; the norm becomes
            an Add of shift / scale.
            move_gains (False): move the gain and bias of layer, RMS, group and instance norms into what follows; the
            norms stay, with a gain of 1.
            affine (False): make every batch norm that could not be folded one Mul and one Add.

    Returns:
        The folded model (a plain copy where nothing folds) and one entry per normalization, in the graph's order.

    Raises:
        ParameterError: an option has a value that it does not know.
    """
    folded = ModelProto()
    folded.CopyFrom(model)
    return folded, _fold_in_place(folded, options)


def fold_checkpoint(
    source: Path,
    target: Path,
    *,
    limits: GraphLimits,
    verify: ProbeOptions | None,
    progress: Progress | None = None,
    **options: Unpack[FoldOptions],
) -> FoldReport:
    """Fold an ONNX file into another one, and prove the two equivalent.

    A fold that fails its proof is withdrawn and the rest is folded again, so that what is written at the end is
    either proven or reported as inconclusive. Where nothing folds, the target is the source, byte for byte.

    Args:
        source: an ONNX file of any origin.
        target: where the folded file goes; it appears at once or not at all.
        limits: what the source may be.
        verify: how to prove, all repetitions within its one deadline; None writes an unproven file.
        progress: called with a step's name, how many steps are done and how many there are.
        options: see `fold_onnx`.

    Raises:
        CheckpointError: the source is not usable.
    """
    report_progress = progress or (lambda step, done, total: None)
    total = len(_STEPS) if verify else len(_STEPS) - 1
    report_progress("load", 0, total)
    model = load_onnx(source, limits=limits)
    deadline = time.monotonic() + (verify.deadline_s if verify else 0.0)

    loaded = [model]  # folded in place the first time: a copy of all weights costs as much memory as the file
    original = _outline(model)
    del model

    def attempt(exclude: Collection[str]) -> Trial[tuple[ModelProto, tuple[PlanEntry, ...]]]:
        report_progress("fold", 1, total)
        folded = loaded.pop() if loaded else ModelProto.FromString(source.read_bytes())
        entries = _fold_in_place(folded, options | {"exclude": {*options.get("exclude", ()), *exclude}})
        outputs = tuple(entry.output for entry in entries if entry.status == "folded")
        report_progress("write", 2, total)
        write_file(target, serialize(folded) if outputs else source.read_bytes())
        outline, certificate = _outline(folded), None
        del folded  # the proof reads the file: no need to hold all weights beside it
        if verify is not None and outputs:
            report_progress("verify", 3, total)
            certificate = certify(source, target, replace(verify, deadline_s=max(deadline - time.monotonic(), 0.0)))
        return Trial((outline, entries), outputs, certificate)

    trial, withdrawn = fold_what_is_proven(attempt, deadline=deadline)
    folded, entries = trial.result
    report_progress("done", total, total)
    return FoldReport(
        entries=describe_folds(original, (_mark(entry, withdrawn) for entry in entries), trial.certificate),
        nodes_before=len(original.graph.node),
        nodes_after=len(folded.graph.node),
        certificate=trial.certificate,
        notes=_notes(original, folded, trial.outputs, withdrawn),
    )


def _fold_in_place(model: ModelProto, options: FoldOptions) -> tuple[PlanEntry, ...]:
    entries = fold_graph(model, **options)
    if any(entry.status == "folded" for entry in entries):
        check_model(model)
    return entries


def _outline(model: ModelProto) -> ModelProto:
    """Inputs and nodes alone, without the values of constants."""
    outline = ModelProto(ir_version=model.ir_version)
    outline.graph.input.extend(model.graph.input)
    for node in model.graph.node:
        is_constant = node.op_type == "Constant"
        outline.graph.node.append(NodeProto(op_type="Constant", output=node.output) if is_constant else node)
    return outline


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
