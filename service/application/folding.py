"""Folding as a use case: in a child process, with a certificate, kept or handed straight back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normcore.checkpoints.formats import Format
from normcore.folding.checkpoint import Options, format_of
from service.application.checkpoints import SUFFIXES, Checkpoints, GraphSandbox, Progress
from service.application.jobs import completed, then_keep
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.metadata import CheckpointRecord, Metadata


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What a caller may ask of a proof; None takes the setting's default."""

    probes: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FoldOptions:
    """What a caller may ask of a fold."""

    fold: Options = field(default_factory=Options)
    verify: VerifyOptions = field(default_factory=VerifyOptions)


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
    format: Format
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

    async def fold_unless_kept(self, checkpoint_id: str, options: FoldOptions) -> FoldOutcome:
        """The kept result of the same fold, where there is one; else as `fold`."""
        for record in await self._metadata.folds_of(checkpoint_id):
            if record.report is not None and record.report.get("options") == self._document(options):
                return FoldOutcome(record, record.report, is_new=False)
        return await self.fold(checkpoint_id, options)

    async def _keep(self, target: Path, source: CheckpointRecord, report: dict[str, Any]) -> FoldOutcome:
        staged = await self._blobs.adopt(target)
        suffix = SUFFIXES["onnx" if source.format == "onnx" else "safetensors"]
        filename = f"{Path(source.filename).stem}.folded{suffix}"
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
            yield FoldedFile(target, await asyncio.to_thread(format_of, target), report)
        finally:
            await self._blobs.discard(staged.path)
            await self._blobs.discard(target)

    async def compare(self, checkpoint_id: str, other_id: str, options: VerifyOptions) -> dict[str, Any]:
        """The certificate of two kept checkpoints."""
        async with self._checkpoints.used(checkpoint_id), self._checkpoints.used(other_id):
            arguments = {
                "original": str(self._checkpoints.path(checkpoint_id)),
                "other": str(self._checkpoints.path(other_id)),
                "limits": self._checkpoints.limits(),
                "verify": self._verify(options),
            }
            return await self._sandbox.run("compare", arguments)

    async def _fold(
        self, source: Path, target: Path, options: FoldOptions, progress: Progress | None = None
    ) -> dict[str, Any]:
        arguments = {
            "source": str(source),
            "target": str(target),
            "limits": self._checkpoints.limits(),
            "options": asdict(options.fold),
            "verify": self._verify(options.verify),
        }
        report = await self._sandbox.run("fold", arguments, progress=progress)
        return report | {"options": self._document(options)}

    def _document(self, options: FoldOptions) -> dict[str, Any]:
        """What was asked for, defaults included, as reports keep it."""
        verify = self._verify(options.verify)
        return asdict(options.fold) | {"verify": {"probes": verify["count"], "seed": verify["seed"]}}

    def _verify(self, options: VerifyOptions) -> dict[str, Any]:
        return {
            "count": options.probes or self._settings.verify_probes,
            "seed": options.seed,
            "deadline_s": 0.8 * self._settings.sandbox_deadline_s,  # the rest is for the fold itself
            "threads": 1,  # a proof must not fight the served models for the cores
        }
