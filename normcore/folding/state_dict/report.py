"""What is known of each batch norm of a checkpoint without a graph, and what a fold did to it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from normcore.folding.report import PlanEntry

Standing = Literal["class-verified", "told", "assumed", "ambiguous", "refused", "kept"]
Kind = Literal["conv", "conv_transpose", "linear"]
Form = Literal["deploy", "shape_preserving"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that speaks for a pairing, against it (`holds` False), or could not be told (None)."""

    check: str
    holds: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A linear operator with as many outputs as the batch norm has channels.

    Attributes:
        key: prefix of its tensors.
        shape: of its weight.
        parent: the module it lies in.
        distance: how many modules with tensors lie between the two, negative where the operator comes after the norm;
            None where the file does not keep the order.
    """

    key: str
    shape: tuple[int, ...]
    parent: str
    distance: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing(PlanEntry):
    """A batch norm of a state_dict; `normalization` and `into` are prefixes of keys.

    Attributes:
        standing: `class-verified` by the graph of a known class, `told` by the caller, `assumed` from evidence alone,
            `ambiguous`, `refused` (it could not be folded into anything) or `kept` (nothing to fold into).
        kind: of the operator it folds into.
        evidence: every check that was made.
        candidates: operators with a fitting shape, nearest first.
        settles: what would turn this into a certainty.
    """

    standing: Standing
    kind: Kind | None = None
    evidence: tuple[Evidence, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    settles: str | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file of tensors holds, without reading it."""

    format: str
    group: str
    groups: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int
    datatypes: dict[str, int]
    keeps_order: bool


@dataclass(frozen=True, slots=True)
class StateDictPlan:
    """Every batch norm of a checkpoint, in the file's order."""

    contents: Contents
    entries: tuple[Pairing, ...]
    architecture: str | None
    notes: tuple[str, ...]

    @property
    def foldable(self) -> int:
        return sum(entry.status == "foldable" for entry in self.entries)

    def count(self, standing: Standing) -> int:
        return sum(entry.standing == standing for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"foldable": self.foldable}


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor of the folded file that the original does not have as it is.

    Attributes:
        key: its key in the folded file.
        old_keys: the keys of the original that it was computed from; a key that is gone is in some change's list.
        eps: what was added to the variance, where a batch norm was folded.
        sha256: of its bytes.
    """

    key: str
    old_keys: tuple[str, ...]
    eps: float | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The folded file in the class it belongs to, against the original in float64.

    Attributes:
        verdict: whether every folded pair agrees within the rounding of its stored weights, and so does the output.
        pairs: how many pairs were compared, each on the input it gets in the original network.
        pair_error: the largest error of a pair, as a share of what rounding its weights allows.
        output_error: max|folded - original| / max|original| at the network's outputs, both in float64.
        input_shapes: what was fed.
    """

    architecture: str
    verdict: Literal["equivalent", "different"]
    sentence: str
    pairs: int
    pair_error: float
    output_error: float
    input_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class StateDictReport:
    """All that is known of one fold of a state_dict.

    Attributes:
        written: whether the target was written; nothing is written where nothing changes.
        manifest: every tensor that is new or changed.
        removed: keys of the original that the folded file lacks.
        loader: Python that loads the folded file into the original class (`deploy` only).
    """

    form: Form
    contents: Contents
    entries: tuple[Pairing, ...]
    architecture: str | None
    written: bool
    manifest: tuple[Change, ...] = ()
    removed: tuple[str, ...] = ()
    proof: Proof | None = None
    loader: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def folded(self) -> int:
        return sum(entry.status == "folded" for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folded": self.folded, "normalizations": len(self.entries)}


__all__ = [
    "Candidate",
    "Change",
    "Contents",
    "Evidence",
    "Form",
    "Kind",
    "Pairing",
    "Proof",
    "Standing",
    "StateDictPlan",
    "StateDictReport",
]
