"""Uploaded checkpoints: kept as files, inspected in a child process before anything else may touch them."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from normcore.folding.checkpoint import DEFAULTS, Options
from service.errors import CheckpointNotFoundError, ConflictError
from service.settings import Settings
from service.storage.blobs import Blobs, StagedBlob
from service.storage.metadata import CheckpointRecord, Metadata, now

Progress = Callable[[str, int, int], None]

# By format, how a file's name ends.
SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch_zip": ".pt"}


class GraphSandbox(Protocol):
    """Where an uploaded graph may be parsed, folded, proven and first loaded."""

    async def run(
        self, operation: str, arguments: Mapping[str, Any], *, progress: Progress | None = None
    ) -> dict[str, Any]: ...


class Checkpoints:
    """Add, list, read and delete checkpoints."""

    def __init__(self, *, blobs: Blobs, metadata: Metadata, sandbox: GraphSandbox, settings: Settings) -> None:
        self._blobs = blobs
        self._metadata = metadata
        self._sandbox = sandbox
        self._settings = settings
        self._uses: Counter[str] = Counter()

    async def stage(self, chunks: AsyncIterator[bytes]) -> StagedBlob:
        """Receive a file that the caller must keep or discard."""
        return await self._blobs.stage(chunks, limit_bytes=self._settings.max_checkpoint_bytes)

    async def keep(
        self, staged: StagedBlob, *, filename: str, folded_from: str | None = None, report: dict[str, Any] | None = None
    ) -> tuple[CheckpointRecord, bool]:
        """Inspect a staged file and keep it, or discard it if that refuses; the flag says whether it is new."""
        try:
            known = await self._metadata.checkpoint(staged.id)
            if known is not None:
                return known, False
            found = await self.inspect(staged.path)
            record = CheckpointRecord(
                id=staged.id,
                filename=filename or f"checkpoint{SUFFIXES.get(found['format'], '')}",
                format=found["format"],
                bytes=staged.bytes,
                created_at=now(),
                summary=found["summary"],
                normalizations=found["normalizations"],
                folded_from=folded_from,
                report=report,
            )
            await self._blobs.keep(staged)
            is_new = await self._metadata.add_checkpoint(record)
        finally:
            await self._blobs.discard(staged.path)
        return (record, True) if is_new else (await self.get(record.id), False)

    async def inspect(self, path: Path, options: Options = DEFAULTS) -> dict[str, Any]:
        """Format, summary and fold plan of a file, found in a child process."""
        arguments = {"path": str(path), "limits": self.limits(), "options": asdict(options)}
        return await self._sandbox.run("inspect", arguments)

    async def plan(self, checkpoint_id: str, options: Options) -> dict[str, Any]:
        """What a fold would do to every normalization; writes nothing."""
        async with self.used(checkpoint_id):
            return await self.inspect(self.path(checkpoint_id), options)

    @asynccontextmanager
    async def used(self, checkpoint_id: str) -> AsyncIterator[CheckpointRecord]:
        """The record of a checkpoint that nobody can delete until the block ends."""
        self._uses[checkpoint_id] += 1  # first: a delete that does not see it is in the database's queue before us
        try:
            yield await self.get(checkpoint_id)
        finally:
            self._uses[checkpoint_id] -= 1
            self._uses += Counter()  # drops zeros

    async def get(self, checkpoint_id: str) -> CheckpointRecord:
        record = await self._metadata.checkpoint(checkpoint_id)
        if record is None:
            raise CheckpointNotFoundError(f"checkpoint: no checkpoint with the id {checkpoint_id[:80]!r}")
        return record

    async def list(self) -> list[CheckpointRecord]:
        return await self._metadata.checkpoints()

    async def delete(self, checkpoint_id: str) -> None:
        """Forget a checkpoint and its file. Raises ConflictError while a model or an operation uses it."""
        await self.get(checkpoint_id)
        if self._uses[checkpoint_id]:
            raise ConflictError("checkpoint: in use by an operation; try again when it has ended")
        users = await self._metadata.delete_checkpoint(checkpoint_id)
        if users:
            raise ConflictError(f"checkpoint: in use by {', '.join(users)}; delete these models first", models=users)
        await self._blobs.delete(checkpoint_id)

    def path(self, checkpoint_id: str) -> Path:
        return self._blobs.path(checkpoint_id)

    def limits(self) -> dict[str, dict[str, int]]:
        """What a file may be, as the sandbox's operations take it."""
        settings = self._settings
        return {
            "graph": {"max_nodes": settings.max_graph_nodes, "max_tensor_bytes": settings.max_tensor_bytes},
            "tensors": {
                "max_tensors": settings.max_tensors,
                "max_header_bytes": settings.max_header_bytes,
                "max_bytes": settings.max_state_bytes,
            },
        }
