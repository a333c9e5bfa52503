"""The JSON documents of our own API. Tensors never pass through here."""

from dataclasses import asdict
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, Json

from normcore.execution import Optimization
from normcore.folding.checkpoint import Options
from normcore.folding.state_dict.options import Told
from service.api.reports import FoldReport, Normalization
from service.application.folding import FoldOptions, VerifyOptions
from service.application.models import Entry
from service.engine.protocol import ModelOptions, TensorSpec
from service.storage.metadata import CheckpointRecord


class Request(BaseModel):
    """A request document: strict, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class VerifyRequest(Request):
    """How to prove."""

    probes: int | None = Field(
        None, ge=4, le=64, description="Probes of the certificate; null: NORMSERVE_VERIFY_PROBES."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the probes.")

    def options(self) -> VerifyOptions:
        return VerifyOptions(probes=self.probes, seed=self.seed)


class PairRequest(Request):
    """A pairing that the caller vouches for."""

    linear: str = Field(max_length=1000, description="Prefix of the operator's keys, such as layer1.0.conv1.")
    eps: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="What this batch norm adds to its variance; null: the eps of the request.",
    )
    kind: Literal["conv", "conv_transpose", "linear"] | None = Field(
        None, description="Needed where the weight's shape fits several; null: what the shape says."
    )


Pairs = dict[str, PairRequest]


class FoldFields(BaseModel):
    """How to fold. The first five concern ONNX files, the others files of named tensors."""

    freeze_initializers: bool = Field(
        False, description="Fold initializers that are also graph inputs, and remove those inputs."
    )
    zero_padding: Literal["auto", "pad", "map", "offset", "refuse"] = Field(
        "auto",
        description="How a norm goes forward into a convolution that pads with zeros: offset leaves one Add before it, "
        "pad pads with the right constant, map adds a bias per position, refuse keeps the norm; auto is offset.",
    )
    cross_activations: bool = Field(False, description="Move positive scales forward through Relu and its kin.")
    move_gains: bool = Field(False, description="Move gains of layer, RMS, group and instance norms forward.")
    affine: bool = Field(False, description="Turn batch norms that cannot be folded into one Mul and one Add.")
    form: Literal["deploy", "shape_preserving"] = Field(
        "deploy", description="Batch norms gone and biases added, or a file that loads into the unchanged class."
    )
    eps: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="What every batch norm adds to its variance; no file says it. null: as pairs or the class say.",
    )
    accept_assumed: bool = Field(False, description="Fold what rests on evidence alone; needs eps.")
    architecture: str | None = Field(
        None, max_length=200, description="Class, such as torchvision/resnet18; null: unknown."
    )
    group: str | None = Field(
        None, max_length=1000, description="Which state_dict of a file with several; null: the only one."
    )
    bake: bool = Field(False, description="Replace weight norm and spectral norm by the weights they compute.")

    def fold_options(self, pairs: Pairs) -> Options:
        told = {norm: Told(pair.linear, pair.eps, pair.kind) for norm, pair in pairs.items()}
        return Options(**self.model_dump(include=set(FoldFields.model_fields)), pairs=told)


class FoldRequest(FoldFields, Request):
    """How to fold, and how to prove it."""

    pairs: Pairs = Field({}, description="By prefix of a batch norm, what it folds into.")
    verify: VerifyRequest = Field(default_factory=VerifyRequest, description="How to prove the fold.")

    def options(self) -> FoldOptions:
        return FoldOptions(fold=self.fold_options(self.pairs), verify=self.verify.options())


class PlanQuery(FoldFields):
    """The options of a fold as a query string."""

    model_config = ConfigDict(extra="forbid")

    pairs: Json[Pairs] = Field("{}", validate_default=True, description="JSON: as in the body of a fold.")

    def options(self) -> Options:
        return self.fold_options(self.pairs)


class FoldQuery(PlanQuery):
    """The options of a fold and its proof as a query string."""

    probes: int | None = Field(
        None, ge=4, le=64, description="Probes of the certificate; null: NORMSERVE_VERIFY_PROBES."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the probes.")

    def fold(self) -> FoldOptions:
        return FoldOptions(fold=self.options(), verify=VerifyOptions(probes=self.probes, seed=self.seed))


class ModelRequest(Request):
    """What to serve, and under which name."""

    name: str = Field(description="Letters, digits, dots, underscores, hyphens and spaces, at most 128.")
    checkpoint: str = Field(description="Id of an uploaded checkpoint.")
    version: int | None = Field(
        None, ge=1, le=2**31 - 1, description="A number of its own; null: the highest version plus one."
    )
    fold: bool = Field(True, description="Serve the certified fold where there is one.")
    freeze_training: bool = Field(
        False,
        description="Serve a network exported in training mode with its running statistics; without, it is refused.",
    )
    max_batch_size: int | None = Field(
        None,
        ge=0,
        le=65536,
        description="Rows that requests are joined up to; 0 runs every request alone; null: 32 where a check finds "
        "that every row is computed by itself, else 0.",
    )
    max_queue_delay_us: int = Field(
        0, ge=0, le=10_000_000, description="Microseconds that a request may wait for others to join it."
    )
    instances: int = Field(1, ge=1, le=64, description="Executions at a time; they divide the threads.")
    device: str = Field("auto", max_length=16, description="auto, cpu or cuda:N.")
    optimization: Optimization = Field("all", description="How far onnxruntime rewrites the graph when it loads.")
    warmup: list[dict[str, list[Annotated[int, Field(ge=0)]]]] = Field(
        default_factory=list,
        max_length=16,
        description="Shapes by input name, each run once with zeros before the model is ready.",
    )

    def options(self) -> ModelOptions:
        return ModelOptions(
            max_batch_size=self.max_batch_size or 0,
            max_queue_delay_us=self.max_queue_delay_us,
            instances=self.instances,
            device=self.device,
            optimization=self.optimization,
            warmup=tuple(self.warmup),
        )


class Checkpoint(BaseModel):
    """A kept checkpoint."""

    id: str = Field(description="SHA-256 of the file.")
    filename: str
    format: str
    bytes: int
    created_at: str
    tensors: int = Field(description="Constant tensors in the file.")
    summary: dict[str, Any] = Field(description="Operators, inputs and outputs, as far as the format shows them.")
    normalizations: list[Normalization] = Field(description="Each normalization: what it folds into, or why not.")
    folded_from: str | None = Field(description="Id of the checkpoint this one was folded from.")

    @classmethod
    def of(cls, record: CheckpointRecord) -> "Checkpoint":
        return cls(
            id=record.id,
            filename=record.filename,
            format=record.format,
            bytes=record.bytes,
            created_at=record.created_at,
            tensors=record.summary["tensors"],
            summary=record.summary,
            normalizations=[Normalization(**entry) for entry in record.normalizations],
            folded_from=record.folded_from,
        )


class CheckpointList(BaseModel):
    """All kept checkpoints, oldest first."""

    checkpoints: list[Checkpoint]


class FoldPlan(BaseModel):
    """What a fold would do."""

    checkpoint: str
    foldable: int = Field(description="How many normalizations would fold.")
    normalizations: list[Normalization]
    notes: list[str]


class FoldAnswer(BaseModel):
    """A folded checkpoint and the report of its fold."""

    checkpoint: Checkpoint
    report: FoldReport


class Tensor(BaseModel):
    """An input or output of a model; -1 is a free axis."""

    name: str
    datatype: str
    shape: list[int]
    optional: bool = False

    @classmethod
    def of(cls, spec: TensorSpec) -> "Tensor":
        return cls(name=spec.name, datatype=spec.datatype, shape=list(spec.shape), optional=spec.is_optional)


class Model(BaseModel):
    """A version of a model."""

    name: str
    version: int
    state: str
    reason: str = Field(description="Why it is not ready; empty otherwise.")
    platform: str | None
    checkpoint: str | None = Field(description="The checkpoint it was made from; none for a built-in model.")
    served_checkpoint: str | None = Field(description="The checkpoint that runs: the same, or its certified fold.")
    fold: dict[str, Any] | None
    options: dict[str, Any] = Field(description="How it runs: batch size, delay, instances, device, optimization.")
    inputs: list[Tensor]
    outputs: list[Tensor]
    infer: str = Field(description="Path of its Open Inference Protocol endpoint.")

    @classmethod
    def of(cls, entry: Entry) -> "Model":
        record, spec = entry.record, entry.loaded.spec if entry.loaded else None
        return cls(
            name=entry.name,
            version=entry.version,
            state=entry.state,
            reason=entry.reason,
            platform=spec.platform if spec else None,
            checkpoint=record.checkpoint if record else None,
            served_checkpoint=record.served_checkpoint if record else None,
            fold=record.fold if record else None,
            options=asdict(entry.options),
            inputs=[Tensor.of(tensor) for tensor in spec.inputs] if spec else [],
            outputs=[Tensor.of(tensor) for tensor in spec.outputs] if spec else [],
            infer=f"/v2/models/{quote(entry.name)}/versions/{entry.version}/infer",
        )


class ServedModel(Model):
    """A version of a model, with requests that a shell can run as they stand."""

    requests: dict[str, str] = Field(
        description="Infer requests in `json` and `binary`: a method's example, or zeros of a shape that the network "
        "takes (a free axis is 1 where none is known). Empty while the version is not ready."
    )


class ServedModelList(BaseModel):
    """The versions of a model."""

    models: list[ServedModel]


class ModelList(BaseModel):
    """All models, by name and version."""

    models: list[Model]


class Problem(BaseModel):
    """Every error answer."""

    error: str = Field(description="A sentence: what was expected and what came.")
    code: str
    request_id: str
    details: dict[str, Any]
