"""The models that are served: registered by name and version, loaded, swapped, unloaded, and there after a restart."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

from normcore.errors import CheckpointError, ParameterError
from service.application.checkpoints import Checkpoints
from service.application.preparation import Preparation, check_name
from service.application.usage import Usage
from service.application.versions import LEFT_OUT, served_versions, with_policy_of
from service.engine.protocol import Engine, ModelOptions
from service.errors import ConflictError, ModelNotFoundError, ModelNotReadyError
from service.storage.metadata import Metadata, ModelRecord

log = logging.getLogger(__name__)

State = Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]
LoadEngine = Callable[[Path, str, str, ModelOptions], Awaitable[Engine]]


@dataclass(slots=True)
class Entry:
    """One version of one model: its record (none for a built-in), its engine while loaded, its counters."""

    name: str
    version: int
    record: ModelRecord | None = None
    state: State = "UNAVAILABLE"
    reason: str = ""
    usage: Usage = field(default_factory=Usage)
    loaded: Engine | None = None

    @property
    def options(self) -> ModelOptions:
        return ModelOptions(**self.record.options) if self.record is not None else ModelOptions()

    def engine(self) -> Engine:
        """The loaded engine. Raises ModelNotReadyError."""
        if self.loaded is None:
            why = f": {self.reason}" if self.reason else ""
            raise ModelNotReadyError(f"model {self.name!r} version {self.version} is not ready{why}")
        return self.loaded


class Models:
    """The registry. Every change of one name happens under that name's lock."""

    def __init__(
        self,
        *,
        metadata: Metadata,
        checkpoints: Checkpoints,
        preparation: Preparation,
        load_engine: LoadEngine,
    ) -> None:
        self._metadata = metadata
        self._checkpoints = checkpoints
        self._preparation = preparation
        self._load_engine = load_engine
        self._entries: dict[str, dict[int, Entry]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # those that are held

    def add_builtin(self, engine: Engine) -> None:
        spec = engine.spec
        entry = Entry(name=spec.name, version=int(spec.version), state="READY", loaded=engine)
        self._entries[spec.name] = {entry.version: entry}

    async def open(self) -> None:
        """Know every registered model; none is loaded yet."""
        for record in await self._metadata.models():
            entry = Entry(name=record.name, version=record.version, record=record, reason="unloaded")
            self._entries.setdefault(record.name, {})[record.version] = entry

    async def restore(self) -> None:
        """Attempt every load that was in force when the service stopped; a failure concerns its own model only."""
        for entry in list(self.entries()):
            async with self._lock(entry.name):
                is_kept = self._entries.get(entry.name, {}).get(entry.version) is entry
                if is_kept and entry.record is not None and entry.record.is_loaded and entry.loaded is None:
                    await self._restore(entry)

    async def close(self) -> None:
        for entry in list(self.entries()):
            if entry.loaded is not None:
                engine, entry.loaded, entry.state = entry.loaded, None, "UNAVAILABLE"
                await engine.close()

    async def register(
        self,
        name: str,
        *,
        checkpoint: str,
        version: int | None,
        fold: bool,
        freeze_training: bool = False,
        options: ModelOptions,
        is_batch_size_automatic: bool = True,
    ) -> Entry:
        """Serve a kept checkpoint, with `fold` its certified fold if there is one.

        With `freeze_training` a network exported in training mode computes with its running statistics.
        """
        check_name(name)
        async with self._lock(name):
            versions = self._entries.get(name, {})
            number = version if version is not None else max(versions, default=0) + 1
            if number in versions:
                raise ConflictError(f"version: model {name!r} already has a version {number}")
            if versions:
                options = with_policy_of(self.find(name).options, options)
            async with self._preparation.prepared(
                name,
                number,
                checkpoint=checkpoint,
                fold=fold,
                freeze_training=freeze_training,
                options=options,
                is_batch_size_automatic=is_batch_size_automatic,
            ) as record:
                return await self._serve(record)

    async def load(self, name: str) -> None:
        """Load the versions that the model's policy serves, and unload the others.

        Where one is loaded, the new engine is ready before the old one closes.
        """
        async with self._lock(name):
            entries = self._registered(name)
            served = served_versions([entry.version for entry in entries], entries[-1].options)
            for entry in entries:
                if entry.version in served:
                    await self._load(entry)
                    await self._set_loaded(entry, is_loaded=True)
            for entry in entries:
                if entry.version not in served:
                    await self._unload(entry, reason=LEFT_OUT)
                    await self._set_loaded(entry, is_loaded=False)

    async def load_files(self, name: str, checkpoints: Mapping[int, str], change: Mapping[str, Any]) -> None:
        """Make these checkpoints the versions of a model, and no others; `change` replaces options.

        All of them are ready before the old versions close; when one fails, the old ones stay.
        """
        check_name(name)
        async with self._lock(name):
            options = replace(ModelOptions(), **change)
            await self._replace(name, {number: (checkpoint, options) for number, checkpoint in checkpoints.items()})

    async def load_changed(self, name: str, change: Mapping[str, Any]) -> None:
        """Load a model with these options of every version replaced."""
        async with self._lock(name):
            served = {}
            for entry in self._registered(name):
                assert entry.record is not None
                served[entry.version] = (entry.record.served_checkpoint, replace(entry.options, **change))
            await self._replace(name, served)

    async def unload(self, name: str) -> None:
        async with self._lock(name):
            for entry in self._registered(name):
                await self._unload(entry)
                await self._set_loaded(entry, is_loaded=False)

    async def delete(self, name: str, version: int) -> None:
        async with self._lock(name):
            self._registered(name)
            entry = self.find(name, version)
            await self._unload(entry)
            await self._metadata.delete_model(name, version)
            del self._entries[name][version]
            if not self._entries[name]:
                del self._entries[name]

    def find(self, name: str, version: int | None = None) -> Entry:
        """A version, or the highest ready one, or the highest. Raises ModelNotFoundError."""
        versions = self._entries.get(name)
        if not versions:
            raise ModelNotFoundError(f"model {name[:128]!r} is unknown")
        if version is not None:
            if version not in versions:
                raise ModelNotFoundError(f"model {name!r} has no version {version}")
            return versions[version]
        return max(versions.values(), key=lambda entry: (entry.loaded is not None, entry.version))

    def ready_versions(self, name: str) -> list[str]:
        return [str(entry.version) for entry in self._sorted(name) if entry.loaded is not None]

    def entries(self) -> Iterable[Entry]:
        for name in sorted(self._entries):
            yield from self._sorted(name)

    def _sorted(self, name: str) -> list[Entry]:
        return [entry for _, entry in sorted(self._entries.get(name, {}).items())]

    def _registered(self, name: str) -> list[Entry]:
        self.find(name)
        entries = self._sorted(name)
        if any(entry.record is None for entry in entries):
            raise ConflictError(f"model {name!r} is built in: it is always loaded")
        return entries

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _replace(self, name: str, versions: Mapping[int, tuple[str, ModelOptions]]) -> None:
        before = self._entries.get(name, {})
        if any(entry.record is None for entry in before.values()):
            raise ConflictError(f"model {name!r} is built in: it is always loaded")
        served = {n for _, options in versions.values() for n in served_versions(versions, options)}
        async with AsyncExitStack() as stack:
            loaded: dict[int, Entry] = {}
            async with AsyncExitStack() as undo:
                for number, (checkpoint, options) in versions.items():
                    preparing = self._preparation.prepared(
                        name, number, checkpoint=checkpoint, fold=False, options=options, is_batch_size_automatic=False
                    )
                    record = await stack.enter_async_context(preparing)
                    old = before.get(number)
                    if old is not None and old.record is not None and old.record.served_checkpoint == checkpoint:
                        record = replace(old.record, options=record.options)
                    record = replace(record, is_loaded=number in served)
                    usage = old.usage if old else Usage()
                    loaded[number] = entry = Entry(
                        name=name, version=number, record=record, usage=usage, reason=LEFT_OUT
                    )
                    if record.is_loaded:
                        await self._load(entry)
                        undo.push_async_callback(self._unload, entry)
                await self._metadata.replace_models(name, [entry.record for entry in loaded.values() if entry.record])
                undo.pop_all()
            self._entries[name] = loaded
        for entry in before.values():
            await self._unload(entry)

    async def _serve(self, record: ModelRecord) -> Entry:
        entry = Entry(name=record.name, version=record.version, record=record)
        await self._load(entry)
        try:
            await self._metadata.add_model(record)
        except BaseException:
            await self._unload(entry)
            raise
        self._entries.setdefault(record.name, {})[record.version] = entry
        return entry

    async def _load(self, entry: Entry) -> None:
        assert entry.record is not None
        previous, entry.state = entry.loaded, "LOADING"
        try:
            path = self._checkpoints.path(entry.record.served_checkpoint)
            entry.loaded = await self._load_engine(path, entry.name, str(entry.version), entry.options)
            entry.reason = ""
        except (CheckpointError, ParameterError) as error:
            entry.reason = str(error)
            raise
        finally:
            entry.state = "READY" if entry.loaded is not None else "UNAVAILABLE"
        if previous is not None:
            try:
                await previous.drain()
            finally:
                await previous.close()

    async def _unload(self, entry: Entry, *, reason: str = "unloaded") -> None:
        engine, entry.loaded = entry.loaded, None
        entry.reason = reason
        if engine is not None:
            entry.state = "UNLOADING"
            try:
                await engine.drain()  # what it has accepted; nobody finds it any more
            finally:
                await engine.close()
                entry.state = "UNAVAILABLE"

    async def _restore(self, entry: Entry) -> None:
        try:
            await self._load(entry)
        except Exception as error:  # one model's failure must not keep the service from starting
            entry.reason = str(error)
            log.exception("a model could not be restored", extra={"model": entry.name, "version": entry.version})

    async def _set_loaded(self, entry: Entry, *, is_loaded: bool) -> None:
        assert entry.record is not None
        entry.record = replace(entry.record, is_loaded=is_loaded)
        await self._metadata.set_loaded(entry.name, entry.version, is_loaded=is_loaded)
