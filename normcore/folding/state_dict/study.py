"""All that is known of a file before anything is written: its modules, and the standing of each batch norm."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from normcore.checkpoints.tensor_file import open_tensors
from normcore.checkpoints.tensors import TensorFile, TensorLimits
from normcore.errors import FoldError
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.state_dict.architectures import Architecture, match_architecture
from normcore.folding.state_dict.evidence import could_be_transposed
from normcore.folding.state_dict.modules import Linear, Modules, Norm, find_modules
from normcore.folding.state_dict.options import StateDictOptions, Told
from normcore.folding.state_dict.pairing import Pairings, read_affine
from normcore.folding.state_dict.prefix import wrapper_prefix
from normcore.folding.state_dict.report import Contents, Kind, Pairing
from normcore.folding.state_dict.rewrite import Fold
from normcore.folding.state_dict.sharing import find_sharing, inconsistent

EPS_TOLD = "given by the caller"


@dataclass(frozen=True, slots=True)
class Study:
    """A file, what it consists of, what can fold and what is known of everything else."""

    source: TensorFile
    modules: Modules
    prefix: str
    contents: Contents
    architecture: Architecture | None
    entries: Mapping[str, Pairing]
    folds: Mapping[str, Fold]


def study(path: Path, *, limits: TensorLimits, options: StateDictOptions) -> Study:
    """Read names, shapes and statistics; weights only as far as sharing asks for it.

    Raises:
        CheckpointError: the file is not usable.
        FoldError: an option cannot be honoured.
    """
    options.check()
    source = open_tensors(path, limits=limits, group=options.group)
    modules = find_modules(source.tensors)
    prefix = wrapper_prefix(source.tensors)
    architecture = None
    if options.architecture is not None:
        architecture = match_architecture(options.architecture, source.tensors, prefix=prefix)
    with path.open("rb") as file:
        entries = _entries(file, source, modules, architecture, options, prefix)
        folds: dict[str, Fold] = {}
        for name, entry in entries.items():
            try:
                fold = _fold(file, source, modules, entry)
            except Refusal as refusal:
                entries[name] = refuse(entry, str(refusal))
            else:
                folds |= {name: fold} if fold else {}
    entries, folds = _without_inconsistent(source, modules, entries, folds)
    return Study(source, modules, prefix, _contents(source), architecture, entries, folds)


def _entries(
    file: BinaryIO,
    source: TensorFile,
    modules: Modules,
    architecture: Architecture | None,
    options: StateDictOptions,
    prefix: str,
) -> dict[str, Pairing]:
    told = _told(options.pairs, modules, prefix)
    pairings = Pairings(file, source, modules)
    entries = {}
    for name, norm in modules.norms.items():
        entry = pairings.entry(name)
        if architecture is not None:
            entry = architecture.settle(entry, name.removeprefix(prefix), prefix=prefix)
            _check_told(entry, told.get(name))
        elif name in told:
            entry = _as_told(entry, norm, told[name], modules, default_eps=options.eps)
        elif entry.standing == "assumed":
            entry = _as_assumed(entry, options)
        entries[name] = entry
    return entries


def _told(pairs: Mapping[str, Told], modules: Modules, prefix: str) -> dict[str, Told]:
    """Pairs by the file's own names; wrappers' prefixes may be left out. Raises FoldError."""
    found = {}
    for name, told in pairs.items():
        own = next((each for each in (name, prefix + name) if each in modules.norms), None)
        linear = next((each for each in (told.linear, prefix + told.linear) if each in modules.linears), None)
        if own is None:
            raise FoldError(f"pairs: {name!r} is no batch norm of the checkpoint: it has no running statistics")
        if linear is None:
            raise FoldError(f"pairs[{name!r}]: {told.linear!r} is no operator of the checkpoint with a weight")
        found[own] = replace(told, linear=linear)
    users = Counter(told.linear for told in found.values())
    for linear, uses in users.items():
        if uses > 1:
            raise FoldError(f"pairs: {linear!r} is named by {uses} batch norms, and can take only one")
    return found


def _check_told(entry: Pairing, told: Told | None) -> None:
    """A known class leaves nothing to tell. Raises FoldError where the caller contradicts it."""
    if told is None:
        return
    if entry.into != told.linear:
        what = entry.into or f"nothing: {entry.reason}"
        raise FoldError(f"pairs[{entry.normalization!r}]: {told.linear!r} contradicts the class, which gives {what}")
    if told.eps is not None and told.eps != entry.eps:
        raise FoldError(f"pairs[{entry.normalization!r}].eps: {told.eps} contradicts the class, which has {entry.eps}")


def _as_told(entry: Pairing, norm: Norm, told: Told, modules: Modules, *, default_eps: float | None) -> Pairing:
    linear = modules.linears[told.linear]
    eps = told.eps if told.eps is not None else default_eps
    if eps is None:
        raise FoldError(f"pairs[{norm.name!r}]: expected its eps, which a state_dict does not hold")
    problem = (entry.reason if entry.standing == "refused" else None) or linear.problem
    if problem:
        raise FoldError(f"pairs[{norm.name!r}]: {problem}")
    is_assumed = told.kind is None and entry.into == linear.name
    kind = entry.kind if is_assumed else _kind(norm, linear, told.kind)
    return replace(
        entry,
        standing="told",
        status="foldable",
        into=linear.name,
        kind=kind,
        eps=eps,
        eps_source=EPS_TOLD,
        reason=None,
        settles=None,
    )


def _kind(norm: Norm, linear: Linear, told: Kind | None) -> Kind:
    """What the operator is. Raises FoldError where the shapes do not fit, or fit several and nobody says."""
    channels, shape = norm.num_features, linear.shape
    fitting: list[Kind] = []
    if shape[0] == channels:
        fitting.append("linear" if len(shape) == 2 else "conv")
    if could_be_transposed(linear, channels):
        fitting.append("conv_transpose")
    where = f"pairs[{norm.name!r}]: {linear.name!r} with a weight of shape {list(shape)}"
    if told is not None:
        if told not in fitting:
            raise FoldError(f"{where} is no {told} with the {channels} outputs that the batch norm has channels")
        return told
    if not fitting:
        raise FoldError(f"{where} cannot have the {channels} outputs that the batch norm has channels")
    is_depthwise = shape[1] == 1 and shape[0] == channels  # scaled alike either way
    if "conv_transpose" in fitting and not is_depthwise:
        raise FoldError(f"{where} could be {' or '.join(fitting)}: say which as its kind")
    return fitting[0]


def _as_assumed(entry: Pairing, options: StateDictOptions) -> Pairing:
    if options.accept_assumed:
        return replace(entry, status="foldable", eps=options.eps, eps_source=EPS_TOLD)
    reason = "it rests on evidence alone: say accept_assumed and eps to fold it"
    return replace(entry, reason=reason, eps=options.eps, eps_source=EPS_TOLD if options.eps is not None else None)


def _fold(file: BinaryIO, source: TensorFile, modules: Modules, entry: Pairing) -> Fold | None:
    if entry.status != "foldable" or entry.into is None or entry.kind is None or entry.eps is None:
        return None
    norm, linear = modules.norms[entry.normalization], modules.linears[entry.into]
    if linear.problem:
        raise Refusal(linear.problem)
    return Fold(norm, linear, entry.kind, entry.eps, read_affine(file, source, norm, eps=entry.eps), entry)


def _without_inconsistent(
    source: TensorFile, modules: Modules, entries: dict[str, Pairing], folds: dict[str, Fold]
) -> tuple[dict[str, Pairing], dict[str, Fold]]:
    """Take back what tensors with several names contradict. Raises FoldError for what the caller vouched for."""
    keys = [
        *(part for linear in modules.linears.values() for part in linear.parts),
        *(key for norm in modules.norms.values() for key in norm.keys if key != norm.num_batches_tracked),
    ]
    sharing = find_sharing(source, keys if folds else ())
    while True:
        problems = inconsistent(folds, sharing)
        if not problems:
            return entries, folds
        for name, reason in problems.items():
            entries[name] = refuse(entries[name], reason)
            del folds[name]


def refuse(entry: Pairing, reason: str) -> Pairing:
    """An entry whose fold turned out to be impossible. Raises FoldError for what the caller vouched for."""
    if entry.standing == "told":
        raise FoldError(f"pairs[{entry.normalization!r}]: {reason}")
    return replace(entry, standing="refused", status="kept", reason=reason, settles=None)


def _contents(source: TensorFile) -> Contents:
    tensors = source.tensors.values()
    return Contents(
        format=source.format,
        group=source.group,
        groups=(source.group, *source.other),
        tensors=len(source.tensors),
        parameters=sum(tensor.elements for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        datatypes=dict(Counter(tensor.datatype for tensor in tensors)),
        keeps_order=source.keeps_order,
    )


__all__ = ["EPS_TOLD", "Study", "refuse", "study"]
