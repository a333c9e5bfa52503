"""The registry of models against loads that take long, fail, or come too late."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from service.application.checkpoints import Checkpoints, Progress
from service.application.folding import Folding
from service.application.models import Models
from service.engine.protocol import Engine, InferResult, ModelSpec, Parameters, Tensors
from service.errors import CheckpointNotFoundError, ConflictError, ModelNotFoundError
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.metadata import Metadata
from tests.service.conftest import small_settings


class FakeSandbox:
    """Finds nothing wrong with any file; first loads wait at a gate."""

    def __init__(self) -> None:
        self.gate, self.entered = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def run(
        self, operation: str, arguments: Mapping[str, Any], *, progress: Progress | None = None
    ) -> dict[str, Any]:
        if operation == "load":
            self.entered.set()
            await self.gate.wait()
        return {"format": "fake", "summary": {"tensors": 0}, "normalizations": []}


class FakeEngine:
    def __init__(self, name: str, version: str) -> None:
        self.spec = ModelSpec(name, version, platform="fake", backend="fake", inputs=(), outputs=())

    async def infer(
        self,
        inputs: Tensors,
        *,
        outputs: Sequence[str] | None = None,
        parameters: Parameters | None = None,
        deadline_s: float,
    ) -> InferResult:
        return InferResult({})

    async def drain(self) -> None: ...

    async def close(self) -> None: ...


class Registry:
    """Models on real storage and fake engines, whose loads wait at a gate."""

    def __init__(self, settings: Settings, blobs: Blobs, metadata: Metadata) -> None:
        self.blobs = blobs
        self.loads: list[str] = []
        self.gate, self.entered = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.sandbox = FakeSandbox()
        self.checkpoints = Checkpoints(blobs=blobs, metadata=metadata, sandbox=self.sandbox, settings=settings)
        folding = Folding(
            checkpoints=self.checkpoints, blobs=blobs, metadata=metadata, sandbox=self.sandbox, settings=settings
        )
        self.models = Models(
            metadata=metadata,
            checkpoints=self.checkpoints,
            folding=folding,
            sandbox=self.sandbox,
            load_engine=self._load,
            settings=settings,
        )

    async def add(self, content: bytes) -> str:
        async def chunks() -> AsyncIterator[bytes]:
            yield content

        record, _ = await self.checkpoints.keep(await self.checkpoints.stage(chunks()), filename="model")
        return record.id

    async def _load(self, path: Path, name: str, version: str) -> Engine:
        self.loads.append(name)
        self.entered.set()
        await self.gate.wait()
        return FakeEngine(name, version)


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[tuple[Settings, Blobs, Metadata]]:
    settings = small_settings(tmp_path)
    settings.data_dir.mkdir()
    blobs, metadata = Blobs(settings.data_dir), Metadata(f"sqlite:///{settings.data_dir / 'test.db'}")
    blobs.open()
    await metadata.open()
    yield settings, blobs, metadata
    await metadata.close()
    blobs.close()


async def test_restore_leaves_out_what_was_deleted_meanwhile(storage: tuple[Settings, Blobs, Metadata]) -> None:
    earlier = Registry(*storage)
    checkpoint = await earlier.add(b"model")
    for name in ("a", "b"):
        await earlier.models.register(name, checkpoint=checkpoint, version=None, fold=False)

    registry = Registry(*storage)
    await registry.models.open()
    registry.gate.clear()
    restoring = asyncio.create_task(registry.models.restore())
    await registry.entered.wait()
    await registry.models.delete("b", 1)
    registry.gate.set()
    await restoring
    assert registry.loads == ["a"]
    assert [(entry.name, entry.state) for entry in registry.models.entries()] == [("a", "READY")]


async def test_a_load_without_its_file_leaves_the_model_as_it_was(storage: tuple[Settings, Blobs, Metadata]) -> None:
    registry = Registry(*storage)
    checkpoint = await registry.add(b"model")
    entry = await registry.models.register("a", checkpoint=checkpoint, version=None, fold=False)
    await registry.blobs.delete(checkpoint)
    with pytest.raises(CheckpointNotFoundError):
        await registry.models.load("a")
    states: list[str] = [entry.state]
    await registry.models.unload("a")
    with pytest.raises(CheckpointNotFoundError):
        await registry.models.load("a")
    states.append(entry.state)
    assert states == ["READY", "UNAVAILABLE"]


async def test_a_checkpoint_is_not_deleted_under_a_registration(storage: tuple[Settings, Blobs, Metadata]) -> None:
    registry = Registry(*storage)
    checkpoint = await registry.add(b"model")
    registry.sandbox.gate.clear()
    registering = asyncio.create_task(registry.models.register("a", checkpoint=checkpoint, version=None, fold=False))
    await registry.sandbox.entered.wait()
    with pytest.raises(ConflictError, match="operation"):
        await registry.checkpoints.delete(checkpoint)
    registry.sandbox.gate.set()
    await registering
    with pytest.raises(ConflictError, match="a/1"):
        await registry.checkpoints.delete(checkpoint)
    await registry.models.delete("a", 1)
    await registry.checkpoints.delete(checkpoint)


async def test_unknown_names_leave_no_locks_behind(storage: tuple[Settings, Blobs, Metadata]) -> None:
    registry = Registry(*storage)
    for n in range(5):
        with pytest.raises(ModelNotFoundError):
            await registry.models.load(f"nobody {n}")
    assert not registry.models._locks
