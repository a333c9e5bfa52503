"""Metadata: what is written is read again, by another process too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from service.errors import StorageFullError
from service.storage.metadata import CheckpointRecord, Metadata, ModelRecord

CHECKPOINT = CheckpointRecord(
    id="a" * 64,
    filename="m.onnx",
    format="onnx",
    bytes=2**40,
    created_at="2026-01-01T00:00:00.000+00:00",
    summary={"tensors": 3},
    normalizations=[{"normalization": "bn", "residual": 1e-8}],
)
MODEL = ModelRecord(
    name="m",
    version=1,
    checkpoint="a" * 64,
    served_checkpoint="b" * 64,
    fold={"requested": True},
    is_loaded=True,
    created_at="2026-01-01T00:00:00.000+00:00",
)


async def opened(folder: Path) -> Metadata:
    metadata = Metadata(f"sqlite:///{folder / 'test.db'}")
    await metadata.open()
    return metadata


async def test_records_survive_reopening(tmp_path: Path) -> None:
    first = await opened(tmp_path)
    assert await first.add_checkpoint(CHECKPOINT)
    await first.add_model(MODEL)
    await first.close()
    second = await opened(tmp_path)
    assert await second.checkpoint(CHECKPOINT.id) == CHECKPOINT
    assert await second.checkpoints() == [CHECKPOINT]
    assert await second.models() == [MODEL]
    await second.close()


async def test_a_second_record_of_one_id_is_not_added(tmp_path: Path) -> None:
    metadata = await opened(tmp_path)
    assert await metadata.add_checkpoint(CHECKPOINT)
    assert not await metadata.add_checkpoint(replace(CHECKPOINT, filename="other"))
    assert await metadata.checkpoints() == [CHECKPOINT]
    await metadata.close()


async def test_changes_concern_one_row(tmp_path: Path) -> None:
    metadata = await opened(tmp_path)
    other = replace(CHECKPOINT, id="c" * 64)
    for record in (CHECKPOINT, other):
        await metadata.add_checkpoint(record)
    for model in (MODEL, replace(MODEL, version=2)):
        await metadata.add_model(model)
    await metadata.set_report(other.id, folded_from=CHECKPOINT.id, report={"folded": 1})
    await metadata.set_loaded("m", 2, is_loaded=False)
    assert await metadata.checkpoints() == [
        CHECKPOINT,
        replace(other, folded_from=CHECKPOINT.id, report={"folded": 1}),
    ]
    assert [model.is_loaded for model in await metadata.models()] == [True, False]
    await metadata.delete_checkpoint(other.id)
    await metadata.delete_model("m", 1)
    assert [record.id for record in await metadata.checkpoints()] == [CHECKPOINT.id]
    assert [model.version for model in await metadata.models()] == [2]
    assert await metadata.checkpoint(other.id) is None
    await metadata.close()


async def test_a_checkpoint_that_models_use_is_not_deleted(tmp_path: Path) -> None:
    metadata = await opened(tmp_path)
    await metadata.add_checkpoint(CHECKPOINT)
    await metadata.add_model(MODEL)
    await metadata.add_model(replace(MODEL, name="n", checkpoint="c" * 64, served_checkpoint=CHECKPOINT.id))
    assert await metadata.delete_checkpoint(CHECKPOINT.id) == ["m/1", "n/1"]
    assert await metadata.checkpoint(CHECKPOINT.id) == CHECKPOINT
    await metadata.delete_model("m", 1)
    await metadata.delete_model("n", 1)
    assert await metadata.delete_checkpoint(CHECKPOINT.id) == []
    assert await metadata.checkpoint(CHECKPOINT.id) is None
    await metadata.close()


async def test_a_full_disk_is_named(tmp_path: Path) -> None:
    metadata = await opened(tmp_path)
    await metadata.close()

    def allow_few_pages(connection: Any, _: object) -> None:
        connection.execute("PRAGMA max_page_count=1")  # fewer than there are: none may be added

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", allow_few_pages)
    try:
        metadata = await opened(tmp_path)
        with pytest.raises(StorageFullError, match="no room"):
            await metadata.add_checkpoint(replace(CHECKPOINT, summary={"large": "x" * 100_000}))
        await metadata.close()
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", allow_few_pages)


async def test_a_commit_waits_for_the_disk(tmp_path: Path) -> None:
    metadata = await opened(tmp_path)
    pragma = sqlalchemy.text("PRAGMA synchronous")
    assert await metadata.transact(lambda connection: connection.execute(pragma).scalar_one()) == 2  # FULL
    await metadata.close()
