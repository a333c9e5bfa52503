"""Any checkpoint, with a graph or without: one door for inspecting, planning and folding."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from normcore.checkpoints.formats import HEAD_BYTES, Format, sniff
from normcore.checkpoints.onnx import GraphLimits, inspect_onnx, load_onnx
from normcore.checkpoints.tensors import TensorLimits
from normcore.errors import FoldError
from normcore.folding.evidence import describe_folds
from normcore.folding.fold import fold_checkpoint
from normcore.folding.onnx.options import FoldOptions, ZeroPadding
from normcore.folding.plan import plan_onnx
from normcore.folding.report import to_json
from normcore.folding.state_dict.fold import fold_state_dict, plan_state_dict
from normcore.folding.state_dict.options import StateDictOptions, Told
from normcore.folding.state_dict.report import Form
from normcore.folding.verify import ProbeOptions

Document = dict[str, Any]
Progress = Callable[[str, int, int], None]

TENSOR_FORMATS: tuple[Format, ...] = ("safetensors", "torch_zip")
"""Formats that hold named tensors without a graph."""

_GRAPH_OPTIONS = ("freeze_initializers", "zero_padding", "cross_activations", "move_gains", "affine")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may be, of either kind."""

    graph: GraphLimits = field(default_factory=GraphLimits)
    tensors: TensorLimits = field(default_factory=TensorLimits)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that may be asked of a fold; the first five of a graph (`fold_onnx`), the rest of named tensors."""

    freeze_initializers: bool = False
    zero_padding: ZeroPadding = "auto"
    cross_activations: bool = False
    move_gains: bool = False
    affine: bool = False
    form: Form = "deploy"
    eps: float | None = None
    accept_assumed: bool = False
    pairs: Mapping[str, Told] = field(default_factory=dict)
    architecture: str | None = None
    group: str | None = None
    bake: bool = False

    def for_graph(self) -> FoldOptions:
        """Raises FoldError where something is asked that only named tensors have."""
        self._refuse_all_but(_GRAPH_OPTIONS, "this is an ONNX file, whose graph says what follows what and every eps")
        return {
            "freeze_initializers": self.freeze_initializers,
            "zero_padding": self.zero_padding,
            "cross_activations": self.cross_activations,
            "move_gains": self.move_gains,
            "affine": self.affine,
        }

    def for_tensors(self) -> StateDictOptions:
        """Raises FoldError where something is asked that only a graph has."""
        names = [each.name for each in fields(StateDictOptions)]
        self._refuse_all_but(names, "this file holds tensors without a graph")
        return StateDictOptions(**{name: getattr(self, name) for name in names})

    def _refuse_all_but(self, allowed: tuple[str, ...] | list[str], reason: str) -> None:
        nothing = Options()
        for each in fields(self):
            if each.name not in allowed and getattr(self, each.name) != getattr(nothing, each.name):
                raise FoldError(f"{each.name}: expected for another kind of checkpoint; {reason}")


DEFAULTS = Options()


def format_of(path: Path) -> Format:
    """What a file is, by its content."""
    with path.open("rb") as file:
        return sniff(file.read(HEAD_BYTES))


def plan_file(path: Path, *, limits: Limits, options: Options = DEFAULTS) -> Document:
    """`{format, summary, normalizations, notes}` of a checkpoint, as JSON has it; nothing is written.

    Args:
        path: a checkpoint of any origin.
        limits: what it may be.
        options: what the fold would be asked for.

    Raises:
        CheckpointError: the file is not usable.
        FoldError: an option cannot be honoured.
    """
    if format_of(path) in TENSOR_FORMATS:
        plan = plan_state_dict(path, limits=limits.tensors, options=options.for_tensors())
        return _document(
            plan.contents.format, asdict(plan.contents), [asdict(entry) for entry in plan.entries], plan.notes
        )
    model = load_onnx(path, limits=limits.graph)
    summary = inspect_onnx(model)
    entries = describe_folds(model, plan_onnx(model, **options.for_graph()).entries, None)
    return _document(summary.format, asdict(summary), [asdict(entry) for entry in entries], ())


def fold_file(
    source: Path,
    target: Path,
    *,
    limits: Limits,
    options: Options = DEFAULTS,
    verify: ProbeOptions | None,
    progress: Progress | None = None,
) -> Document:
    """Fold a checkpoint into another file, and prove what can be proven; the report, as JSON has it.

    An ONNX file becomes an ONNX file, named tensors become a safetensors file. Where nothing folds, the target is the
    source, byte for byte.

    Args:
        source: a checkpoint of any origin.
        target: where the folded file goes; it appears at once or not at all.
        limits: what the source may be.
        options: what to fold and how.
        verify: how to prove a graph; None writes an unproven file.
        progress: called with a step's name, how many steps are done and how many there are.

    Raises:
        CheckpointError: the source is not usable.
        FoldError: an option cannot be honoured.
    """
    if format_of(source) in TENSOR_FORMATS:
        found = fold_state_dict(source, target, limits=limits.tensors, options=options.for_tensors(), progress=progress)
        if not found.written:
            _copy(source, target)
        return to_json(found.to_dict())
    report = fold_checkpoint(
        source, target, limits=limits.graph, verify=verify, progress=progress, **options.for_graph()
    )
    return to_json(report.to_dict())


def verdict_of(report: Mapping[str, Any]) -> str:
    """One word for a report: its proof's verdict, `unproven` where nothing was proven, `unchanged` if nothing folds."""
    proof = report.get("certificate") or report.get("proof")
    if proof is not None:
        return str(proof["verdict"])
    return "unproven" if report["folded"] else "unchanged"


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _document(kind: str, summary: Document, entries: list[Document], notes: tuple[str, ...]) -> Document:
    return to_json({"format": kind, "summary": summary, "normalizations": entries, "notes": notes})


__all__ = [
    "DEFAULTS",
    "TENSOR_FORMATS",
    "Limits",
    "Options",
    "fold_file",
    "format_of",
    "plan_file",
    "verdict_of",
]
