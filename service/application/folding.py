"""Folding as a use case: in a child process, with a certificate, kept or handed straight back."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.application.checkpoints import Checkpoints, GraphSandbox, Progress
from service.application.jobs import completed, then_keep
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.metadata import CheckpointRecord, Metadata


@dataclass(frozen=True, slots=True)
class FoldOptions:
    """What a caller may ask of a fold; None takes the setting's default."""

    freeze_initializers: bool = False
    probes: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FoldOutcome:
    """The folded checkpoint (the same one when nothing folds), its report, and whether the checkpoint is new."""

    checkpoint: CheckpointRecord
    report: dict[str, Any]
    is_new: bool


@dataclass(frozen=True, slots=True)
class FoldedFile:
    """A folded file that exists for the length of one answer."""

    path: Path
    report: dict[str, Any]


class Folding:
    """Fold a kept checkpoint, or a stream."""

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        blobs: Blobs,
        metadata: Metadata,
        sandbox: GraphSandbox,
        settings: Settings,
    ) -> None:
        self._checkpoints = checkpoints
        self._blobs = blobs
        self._metadata = metadata
        self._sandbox = sandbox
        self._settings = settings

    async def fold(self, checkpoint_id: str, options: FoldOptions, *, progress: Progress | None = None) -> FoldOutcome:
        """Fold a kept checkpoint into a new one beside it; `progress` hears of every step."""
        async with self._checkpoints.used(checkpoint_id) as source:
            target = self._blobs.stage_path()
            try:
                report = await self._fold(self._checkpoints.path(source.id), target, options, then_keep(progress))
                if not report["folded"]:
                    return FoldOutcome(source, report, is_new=False)
                return await completed(self._keep(target, source, report))
            finally:
                await self._blobs.discard(target)

    async def _keep(self, target: Path, source: CheckpointRecord, report: dict[str, Any]) -> FoldOutcome:
        staged = await self._blobs.adopt(target)
        filename = f"{Path(source.filename).stem}.folded.onnx"
        record, is_new = await self._checkpoints.keep(staged, filename=filename, folded_from=source.id, report=report)
        if not is_new:
            await self._metadata.set_report(record.id, folded_from=source.id, report=report)
        return FoldOutcome(await self._checkpoints.get(record.id), report, is_new=is_new)

    @asynccontextmanager
    async def fold_once(self, chunks: AsyncIterator[bytes], options: FoldOptions) -> AsyncIterator[FoldedFile]:
        """Fold a stream; nothing is kept once the context ends."""
        staged = await self._checkpoints.stage(chunks)
        target = self._blobs.stage_path()
        try:
            report = await self._fold(staged.path, target, options)
            yield FoldedFile(target, report)
        finally:
            await self._blobs.discard(staged.path)
            await self._blobs.discard(target)

    async def _fold(
        self, source: Path, target: Path, options: FoldOptions, progress: Progress | None = None
    ) -> dict[str, Any]:
        verify = {
            "count": options.probes or self._settings.verify_probes,
            "seed": options.seed,
            "deadline_s": 0.8 * self._settings.sandbox_deadline_s,  # the rest is for the fold itself
            "threads": 1,  # a proof must not fight the served models for the cores
        }
        arguments = {
            "source": str(source),
            "target": str(target),
            "limits": self._checkpoints.graph_limits(),
            "freeze_initializers": options.freeze_initializers,
            "verify": verify,
        }
        return await self._sandbox.run("fold", arguments, progress=progress)
