"""What a fold says of itself: one entry per normalization, one certificate for the network."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["foldable", "folded", "withdrawn", "kept"]
Direction = Literal["backward", "forward", "merge", "in place"]
Verdict = Literal["equivalent", "different", "inconclusive"]


@dataclass(frozen=True, slots=True)
class TensorHash:
    """One constant of a network: which it is, and the SHA-256 of its elements in row-major order."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One normalization of a checkpoint: what it folds into, or the reason why not.

    Attributes:
        normalization: name of the normalization node, or its output where the node has no name.
        operator: its ONNX operator.
        num_features: channels, where they are known.
        status: `foldable` in a plan; `folded`, `withdrawn` (a proof failed) or `kept` after a fold.
        pattern: the operators matched, such as `ConvTranspose -> Add -> BatchNormalization`.
        rule: name of the rule that matched.
        into: name of the linear node that takes the normalization.
        formula: what the rule writes, in words of folding.
        output: name of the tensor the normalization produced; it keeps this name after the fold.
        residual: after a fold, the largest relative difference between the affine map stored in the folded operator
            and the exact one in float64.
        reason: why it is kept or was withdrawn.
        eps: what the normalization adds to the variance.
        eps_source: where that number comes from, such as `attribute of the node` or `given by the caller`.
        consumers: nodes that read the normalization's output.
        direction: where it went: into what stands before it, into what follows, into another normalization, or nowhere.
        option: the choice by which it could be folded, where there was one, such as `offset` for zero padding.
        before: constants that the rewritten operators held.
        after: constants that they hold instead.
    """

    normalization: str
    operator: str
    num_features: int | None
    status: Status
    output: str
    pattern: str | None = None
    rule: str | None = None
    into: str | None = None
    formula: str | None = None
    residual: float | None = None
    reason: str | None = None
    eps: float | None = None
    eps_source: str | None = None
    consumers: tuple[str, ...] = ()
    direction: Direction | None = None
    option: str | None = None
    before: tuple[TensorHash, ...] = ()
    after: tuple[TensorHash, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Every normalization of a checkpoint, in the order of the graph."""

    entries: tuple[PlanEntry, ...]

    @property
    def foldable(self) -> int:
        return sum(entry.status == "foldable" for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe of one output. Errors are max|a - b| over the output; `scale` is max|reference|, all in float64.

    Attributes:
        kind: random, constant, large offset, impulse.
        shapes: shape of every input.
        output: name of the graph output.
        error_original: unfolded in native precision against unfolded in float64.
        error_folded: folded in native precision against unfolded in float64.
        error_between: folded against unfolded, both native.
        error_exact: folded in float64 against unfolded in float64.
        bound: what error_folded may be.
        conclusive: whether the probe can tell anything.
        equivalent: whether the bounds hold.
        reason: why it can tell nothing: the output hardly varies, or the original itself is far from float64.
    """

    kind: str
    seed: int
    shapes: dict[str, tuple[int, ...]]
    output: str
    scale: float
    error_original: float
    error_folded: float
    error_between: float
    error_exact: float
    bound: float
    conclusive: bool
    equivalent: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """A part of both networks that was rewritten, compared by itself in float64.

    It begins at tensors that both networks have and ends at the next one that both have.

    Attributes:
        output: the tensor at which it ends.
        error: max|folded - original| there, both in float64 from the same beginning.
        scale: max|original| there.
        equivalent: whether rounding the stored weights explains the error.
        tensors: what the original computes in it, `output` included; the folded network has no others of these.
        before: the operators of the original.
        after: the operators of the folded network.
        constants_before: constants that only the original reads in it.
        constants_after: constants that only the folded network reads in it.
    """

    output: str
    error: float
    scale: float
    equivalent: bool
    tensors: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    constants_before: tuple[TensorHash, ...] = ()
    constants_after: tuple[TensorHash, ...] = ()


@dataclass(frozen=True, slots=True)
class Certificate:
    """The comparison of two checkpoint files, whoever made them.

    Attributes:
        verdict: `equivalent`, `different`, or `inconclusive` where nothing is proved.
        sentence: the verdict in words, with its numbers.
        original_sha256: of the one file.
        folded_sha256: of the other.
        probes: every probe of every output.
        inconclusive: the probes that could tell nothing, and why.
        regions: every part that differs between the two, by itself.
        reference: what computed the two precisions.
    """

    verdict: Verdict
    sentence: str
    original_sha256: str
    folded_sha256: str
    probes: tuple[Probe, ...]
    inconclusive: tuple[str, ...]
    regions: tuple[Region, ...]
    reference: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: None in place of NaN and the infinities."""
        return to_json(asdict(self))


@dataclass(frozen=True, slots=True)
class FoldReport:
    """All that is known of one fold."""

    entries: tuple[PlanEntry, ...]
    nodes_before: int
    nodes_after: int
    certificate: Certificate | None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def folded(self) -> int:
        return sum(entry.status == "folded" for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: None in place of NaN and the infinities."""
        return to_json(asdict(self) | {"folded": self.folded, "normalizations": len(self.entries)})


def to_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """A nested document as JSON has it: lists for tuples, None in place of NaN and the infinities."""
    return {name: _finite(value) for name, value in document.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return to_json(value)
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
