"""The JSON of plans, reports and certificates; its field names are stable."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from normcore.recalibration.report import Kept, LayerShift

Number = float | None
_INFINITE = "null where it is infinite"


class TensorHash(BaseModel):
    """A constant of a network."""

    name: str
    shape: list[int]
    datatype: str
    sha256: str = Field(description="Of its elements in row-major order.")


class Evidence(BaseModel):
    """One thing that speaks for or against a pairing of named tensors."""

    check: str
    holds: bool | None = Field(description="null where it could not be told.")
    detail: str


class Candidate(BaseModel):
    """A linear operator with as many outputs as a batch norm has channels."""

    key: str = Field(description="Prefix of its tensors.")
    shape: list[int]
    parent: str
    distance: int | None = Field(description="Modules between the two in the file; null where it keeps no order.")


class Change(BaseModel):
    """A tensor of the folded file that the original has not, or has otherwise."""

    key: str
    old_keys: list[str] = Field(description="What it was computed from.")
    eps: float | None
    sha256: str


class Proof(BaseModel):
    """A folded file of named tensors in the class it belongs to, against the original in float64."""

    architecture: str
    verdict: Literal["equivalent", "different"]
    sentence: str
    pairs: int
    pair_error: Number = Field(description="Largest error of a pair, as a share of what rounding its weights allows.")
    output_error: Number = Field(description="max|folded - original| / max|original| at the outputs.")
    input_shapes: list[list[int]]


class Normalization(BaseModel):
    """One normalization: what it folds into, or the reason why not."""

    normalization: str = Field(description="Name of the node, or of its output where the node has none.")
    operator: str
    num_features: int | None = Field(description="Channels, where they are known.")
    status: str = Field(
        description="`foldable` in a plan; `folded`, `withdrawn` (a proof failed) or `kept` in a report."
    )
    output: str = Field(description="Name of the tensor it produces.")
    pattern: str | None = Field(None, description="Operators matched.", examples=["Conv -> BatchNormalization"])
    rule: str | None = Field(None, description="Rule that matched.")
    into: str | None = Field(None, description="The linear operator that takes it.")
    formula: str | None = Field(None, description="What is written into that operator.")
    residual: Number = Field(None, description="Largest relative difference between stored and exact constants.")
    reason: str | None = Field(None, description="Why it is kept or was withdrawn.")
    eps: float | None = None
    eps_source: str | None = Field(None, description="Where eps comes from.")
    consumers: list[str] = Field([], description="Nodes that read its output.")
    before: list[TensorHash] = Field([], description="Constants that the fold replaced.")
    after: list[TensorHash] = Field([], description="Constants that replace them.")
    direction: str | None = Field(None, description="Where it went.", examples=["backward"])
    option: str | None = Field(None, description="The choice by which it could be folded, such as `offset`.")
    standing: str | None = Field(
        None, description="Of named tensors: class-verified, told, assumed, ambiguous, refused or kept."
    )
    kind: str | None = Field(None, description="Of named tensors: conv, conv_transpose or linear.")
    evidence: list[Evidence] = Field([], description="Of named tensors: every check that was made.")
    candidates: list[Candidate] = Field([], description="Of named tensors: operators with a fitting shape.")
    settles: str | None = Field(None, description="Of named tensors: what would make the pairing certain.")


class Probe(BaseModel):
    """One probe of one output. Errors are max|a - b|."""

    kind: str = Field(examples=["random"])
    seed: int
    shapes: dict[str, list[int]] = Field(description="Shape of every input.")
    output: str
    scale: float = Field(description="max|unfolded in float64|.")
    error_original: Number = Field(description="Unfolded in native precision against unfolded in float64.")
    error_folded: Number = Field(description=f"Folded in native precision against unfolded in float64; {_INFINITE}.")
    error_between: Number = Field(description=f"Folded against unfolded, both native; {_INFINITE}.")
    error_exact: Number = Field(description=f"Folded against unfolded, both in float64; {_INFINITE}.")
    bound: float = Field(description="What error_folded and error_exact may be: 4 error_original + 8 ulp of scale.")
    conclusive: bool = Field(description="Whether this probe can tell anything.")
    equivalent: bool
    reason: str | None = Field(None, description="Why it can tell nothing.")


class Region(BaseModel):
    """A part of both networks that was rewritten, compared by itself in float64."""

    output: str = Field(description="The tensor at which it ends.")
    error: Number = Field(description=f"max|folded - unfolded| there; {_INFINITE}.")
    scale: float
    equivalent: bool = Field(description="Whether rounding the stored weights explains the error.")
    tensors: list[str] = Field([], description="What only the unfolded network computes in it, and `output`.")
    before: list[str] = Field([], description="Operators of the unfolded network.")
    after: list[str] = Field([], description="Operators of the folded network.")
    constants_before: list[TensorHash] = Field([], description="Constants that only the unfolded network reads in it.")
    constants_after: list[TensorHash] = Field([], description="Constants that only the folded network reads in it.")


class Certificate(BaseModel):
    """The comparison of two checkpoint files."""

    verdict: Literal["equivalent", "different", "inconclusive"]
    sentence: str = Field(description="The verdict in words, with its numbers.")
    original_sha256: str
    folded_sha256: str
    probes: list[Probe]
    inconclusive: list[str] = Field([], description="The probes that could tell nothing, and why.")
    regions: list[Region]
    reference: str = Field(description="What computed the two precisions.")


class FoldReport(BaseModel):
    """All that is known of one fold."""

    folded: int = Field(description="How many normalizations were folded.")
    normalizations: int = Field(description="How many there are.")
    entries: list[Normalization]
    notes: list[str]
    options: dict[str, Any] = Field({}, description="What was asked for, defaults included.")
    nodes_before: int | None = Field(None, description="Nodes of a graph, `Constant` nodes among them.")
    nodes_after: int | None = Field(None, description="The same after the fold, which needs fewer constants.")
    certificate: Certificate | None = Field(None, description="Of a graph; null where nothing was folded.")
    form: str | None = Field(None, description="Of named tensors: deploy or shape_preserving.")
    contents: dict[str, Any] | None = Field(None, description="Of named tensors: what the file holds.")
    architecture: str | None = Field(None, description="Of named tensors: the class that was asked for.")
    written: bool | None = Field(None, description="Of named tensors: whether anything changed.")
    manifest: list[Change] = Field([], description="Of named tensors: every tensor that is new or changed.")
    removed: list[str] = Field([], description="Of named tensors: keys that the folded file lacks.")
    proof: Proof | None = Field(None, description="Of named tensors of a known class.")
    loader: str | None = Field(None, description="Python that loads the folded file into the original class.")


class RecalibrationReport(BaseModel):
    """What was recomputed, from how much, and how far it moved."""

    recalibrated: int = Field(description="Batch norms with recomputed statistics.")
    recalibrated_from: str = Field(description="Id of the checkpoint that was recalibrated.")
    layers: list[LayerShift] = Field(description="The recalibrated batch norms, in the order of the graph.")
    kept: list[Kept] = Field(description="The others, each with the reason.")
    passes: int = Field(description="Partial runs of the network over all batches, one per depth.")
    batches: int
    notes: list[str]
