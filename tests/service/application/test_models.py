"""The registry of models against loads that take long, fail, or come too late."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normcore.errors import ParameterError
from service.application.checkpoints import Checkpoints, Progress
from service.application.folding import Folding
from service.application.models import Entry, Models
from service.application.preparation import Preparation
from service.engine.protocol import Engine, InferResult, ModelOptions, ModelSpec, Parameters, Tensors
from service.errors import CheckpointNotFoundError, ConflictError, ModelNotFoundError
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.metadata import Metadata
from tests.service.conftest import small_settings


class FakeSandbox:
    """Finds nothing wrong with any file; first loads wait at a gate."""

    def __init__(self) -> None:
        self.are_rows_independent = True
        self.gate, self.entered = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def run(
        self, operation: str, arguments: Mapping[str, Any], *, progress: Progress | None = None
    ) -> dict[str, Any]:
        if operation == "load":
            self.entered.set()
            await self.gate.wait()
        rows = {"are_independent": self.are_rows_independent, "sentence": "as the test says"}
        return {
            "format": "fake",
            "summary": {"tensors": 0},
            "normalizations": [],
            "shapes": None,
            "rows": rows,
            "is_cost_known": True,
        }


class FakeEngine:
    waiting = 0

    def __init__(self, name: str, version: str) -> None:
        self.spec = ModelSpec(name, version, platform="fake", backend="fake", inputs=(), outputs=())

    async def infer(
        self,
        inputs: Tensors,
        *,
        outputs: Sequence[str] | None = None,
        parameters: Parameters | None = None,
        deadline_s: float,
        is_alone: bool = False,
    ) -> InferResult:
        return InferResult({})

    def infer_now(
        self, requests: Sequence[tuple[Tensors, Sequence[str] | None]], *, deadline_s: float
    ) -> list[InferResult | None]:
        return [None] * len(requests)

    async def drain(self) -> None: ...

    async def close(self) -> None: ...


class Registry:
    """Models on real storage and fake engines, whose loads wait at a gate."""

    def __init__(self, settings: Settings, blobs: Blobs, metadata: Metadata) -> None:
        self.blobs, self.metadata = blobs, metadata
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
            preparation=Preparation(
                checkpoints=self.checkpoints, blobs=blobs, folding=folding, sandbox=self.sandbox, settings=settings
            ),
            load_engine=self._load,
        )

    async def add(self, content: bytes) -> str:
        async def chunks() -> AsyncIterator[bytes]:
            yield content

        record, _ = await self.checkpoints.keep(await self.checkpoints.stage(chunks()), filename="model")
        return record.id

    async def _load(self, path: Path, name: str, version: str, options: ModelOptions) -> Engine:
        self.loads.append(name)
        self.options = options
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
        await earlier.models.register(name, checkpoint=checkpoint, version=None, fold=False, options=ModelOptions())

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
    entry = await registry.models.register("a", checkpoint=checkpoint, version=None, fold=False, options=ModelOptions())
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
    registering = asyncio.create_task(
        registry.models.register("a", checkpoint=checkpoint, version=None, fold=False, options=ModelOptions())
    )
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


@pytest.mark.parametrize("are_independent", [True, False])
async def test_batch_size_follows_the_check_of_the_rows(
    storage: tuple[Settings, Blobs, Metadata], are_independent: bool
) -> None:
    registry = Registry(*storage)
    registry.sandbox.are_rows_independent = are_independent
    checkpoint = await registry.add(b"one")
    asked = ModelOptions(max_batch_size=7, instances=2)

    automatic = await registry.models.register("m", checkpoint=checkpoint, version=1, fold=False, options=asked)
    assert automatic.options == ModelOptions(
        max_batch_size=32 if are_independent else 0, instances=2, is_cost_known=True
    )
    assert registry.options == automatic.options

    async def register_as_asked() -> Entry:
        return await registry.models.register(
            "m", checkpoint=checkpoint, version=2, fold=False, options=asked, is_batch_size_automatic=False
        )

    if are_independent:
        assert (await register_as_asked()).options == replace(asked, is_cost_known=True)
    else:
        with pytest.raises(ParameterError, match=r"max_batch_size: expected 0: .* received 7; as the test says"):
            await register_as_asked()
        assert registry.models.ready_versions("m") == ["1"]


async def test_options_are_there_after_a_restart(storage: tuple[Settings, Blobs, Metadata]) -> None:
    registry = Registry(*storage)
    options = ModelOptions(max_queue_delay_us=5, device="cpu", optimization="basic", warmup=({"x": [1, 2]},))
    checkpoint = await registry.add(b"one")
    entry = await registry.models.register("m", checkpoint=checkpoint, version=1, fold=False, options=options)
    again = Entry(name="m", version=1, record=(await registry.metadata.models())[0])
    assert list(again.options.warmup) == [{"x": [1, 2]}]
    assert list(again.options.specific_versions) == []
    assert replace(again.options, warmup=(), specific_versions=()) == replace(entry.options, warmup=())


async def test_a_warm_up_larger_than_any_body_is_refused(storage: tuple[Settings, Blobs, Metadata]) -> None:
    registry = Registry(*storage)
    checkpoint = await registry.add(b"one")
    options = ModelOptions(warmup=({"x": [10**9, 10**9]},))
    with pytest.raises(ParameterError, match="warmup"):
        await registry.models.register("m", checkpoint=checkpoint, version=1, fold=False, options=options)
