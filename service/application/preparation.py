"""What happens before a version of a model is served: its fold, its first load, and the check of its rows."""

import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from normcore.checkpoints.formats import ADVICE
from normcore.errors import CheckpointError, ParameterError
from normcore.folding.checkpoint import TENSOR_FORMATS
from service.application.checkpoints import Checkpoints, GraphSandbox
from service.application.folding import Folding, FoldOptions
from service.engine.protocol import ModelOptions
from service.errors import ConflictError
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.metadata import CheckpointRecord, ModelRecord, now

# Rows of a batch where nobody says, for networks whose rows are independent.
AUTOMATIC_BATCH_SIZE = 32

_ADVICE: Mapping[str, str] = {str(kind): advice for kind, advice in ADVICE.items()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")


class Preparation:
    """Makes the record of a version out of a kept checkpoint."""

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        blobs: Blobs,
        folding: Folding,
        sandbox: GraphSandbox,
        settings: Settings,
    ) -> None:
        self._checkpoints = checkpoints
        self._blobs = blobs
        self._folding = folding
        self._sandbox = sandbox
        self._settings = settings

    @asynccontextmanager
    async def prepared(
        self,
        name: str,
        version: int,
        *,
        checkpoint: str,
        fold: bool,
        freeze_training: bool = False,
        options: ModelOptions,
        is_batch_size_automatic: bool,
    ) -> AsyncIterator[ModelRecord]:
        """The record; nobody can delete its checkpoints until the block ends, by when it is registered or dropped.

        Requests are joined only where the rows of a batch were seen to be independent. With an automatic batch size
        a network that fails this check runs every request alone; with one that was asked for it is refused.
        """
        self._check_warmup(options)
        async with self._checkpoints.used(checkpoint) as source:
            if source.format in TENSOR_FORMATS:
                raise CheckpointError(f"checkpoint: expected one with a graph; {_ADVICE[source.format]}")
            frozen = await self._freeze(source) if freeze_training else source.id
            served, outcome = await self._fold(frozen) if fold else (frozen, {"requested": False})
            async with self._checkpoints.used(served):
                found = await self._first_load(served, options)
                yield ModelRecord(
                    name=name,
                    version=version,
                    checkpoint=source.id,
                    served_checkpoint=served,
                    fold=outcome,
                    is_loaded=True,
                    created_at=now(),
                    options=asdict(
                        _batched(
                            replace(options, is_cost_known=found["is_cost_known"]),
                            found["rows"],
                            is_automatic=is_batch_size_automatic,
                        )
                    ),
                    shapes=found["shapes"],
                )

    def _check_warmup(self, options: ModelOptions) -> None:
        limit = self._settings.max_body_bytes
        for shapes in options.warmup:
            elements = sum(math.prod(shape) for shape in shapes.values())
            if elements > limit:
                expected = f"at most {limit} elements, as many as a body has bytes (NORMSERVE_MAX_BODY_BYTES)"
                raise ParameterError("warmup", expected=expected, received=f"{elements}")

    async def _freeze(self, source: CheckpointRecord) -> str:
        """The checkpoint whose batch norms use their running statistics; the same one where all do already."""
        target = self._blobs.stage_path()
        try:
            arguments = {
                "source": str(self._checkpoints.path(source.id)),
                "target": str(target),
                "limits": self._checkpoints.limits(),
            }
            found = await self._sandbox.run("freeze", arguments)
            if not found["frozen"]:
                return source.id
            staged = await self._blobs.adopt(target)
            filename = f"{Path(source.filename).stem}.frozen.onnx"
            record, _ = await self._checkpoints.keep(staged, filename=filename)
            return record.id
        finally:
            await self._blobs.discard(target)

    async def _fold(self, checkpoint_id: str) -> tuple[str, dict[str, Any]]:
        outcome = await self._folding.fold_unless_kept(checkpoint_id, FoldOptions())
        certificate = outcome.report["certificate"]
        verdict = certificate["verdict"] if certificate else None
        summary = {"requested": True, "folded": outcome.report["folded"], "verdict": verdict}
        if not outcome.report["folded"]:
            return checkpoint_id, summary | {"reason": "nothing folds; the checkpoint is served as it is"}
        if verdict != "equivalent":
            return checkpoint_id, summary | {"folded": 0, "reason": f"served unfolded: {certificate['sentence']}"}
        return outcome.checkpoint.id, summary | {"reason": certificate["sentence"]}

    async def _first_load(self, checkpoint_id: str, options: ModelOptions) -> dict[str, Any]:
        """What the sandbox found: shapes that the graph takes, and whether the rows of a batch are independent."""
        arguments = {
            "path": str(self._checkpoints.path(checkpoint_id)),
            "threads": 1,
            "deadline_s": self._settings.infer_deadline_s,
            "optimization": options.optimization,
        }
        return await self._sandbox.run("load", arguments)


def check_name(name: str) -> None:
    """Raises ParameterError or ConflictError where no model can have this name."""
    if not _NAME.fullmatch(name):
        expected = "1 to 128 letters, digits, dots, underscores, hyphens or spaces, the first a letter or digit"
        raise ParameterError("name", expected=expected, received=repr(name[:200]))
    if name == "stats" or name.startswith("normcore."):
        raise ConflictError(
            f"name: {name!r} is reserved; 'stats' and names that begin with 'normcore.' are the service's"
        )


def _batched(options: ModelOptions, rows: Mapping[str, Any], *, is_automatic: bool) -> ModelOptions:
    """The options with the batch size that the rows allow. Raises ParameterError."""
    if is_automatic:
        return replace(options, max_batch_size=AUTOMATIC_BATCH_SIZE if rows["are_independent"] else 0)
    if options.max_batch_size and not rows["are_independent"]:
        expected = "0: requests cannot share an execution of this network"
        raise ParameterError(
            "max_batch_size", expected=expected, received=f"{options.max_batch_size}; {rows['sentence']}"
        )
    return options
