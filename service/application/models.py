"""The models that are served: registered by name and version, loaded, swapped, unloaded, and there after a restart."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

from normcore.checkpoints.formats import ADVICE
from normcore.errors import CheckpointError, ParameterError
from normcore.folding.checkpoint import TENSOR_FORMATS
from service.application.checkpoints import Checkpoints, GraphSandbox
from service.application.folding import Folding, FoldOptions
from service.application.usage import Usage
from service.engine.protocol import Engine
from service.errors import ConflictError, ModelNotFoundError, ModelNotReadyError
from service.settings import Settings
from service.storage.metadata import Metadata, ModelRecord, now

log = logging.getLogger(__name__)

State = Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]
LoadEngine = Callable[[Path, str, str], Awaitable[Engine]]

_ADVICE: Mapping[str, str] = {str(kind): advice for kind, advice in ADVICE.items()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")


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
        folding: Folding,
        sandbox: GraphSandbox,
        load_engine: LoadEngine,
        settings: Settings,
    ) -> None:
        self._metadata = metadata
        self._checkpoints = checkpoints
        self._folding = folding
        self._sandbox = sandbox
        self._load_engine = load_engine
        self._settings = settings
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

    async def register(self, name: str, *, checkpoint: str, version: int | None, fold: bool) -> Entry:
        """Serve a kept checkpoint; with `fold`, serve its certified fold if there is one."""
        _check_name(name)
        async with self._lock(name), self._checkpoints.used(checkpoint) as source:
            if source.format in TENSOR_FORMATS:
                raise CheckpointError(f"checkpoint: expected one with a graph; {_ADVICE[source.format]}")
            versions = self._entries.get(name, {})
            number = version if version is not None else max(versions, default=0) + 1
            if number in versions:
                raise ConflictError(f"version: model {name!r} already has a version {number}")
            served, outcome = await self._fold(source.id) if fold else (source.id, {"requested": False})
            record = ModelRecord(
                name=name,
                version=number,
                checkpoint=source.id,
                served_checkpoint=served,
                fold=outcome,
                is_loaded=True,
                created_at=now(),
            )
            async with self._checkpoints.used(served):
                return await self._serve(record)

    async def load(self, name: str) -> None:
        """Load every version of a model; where one is loaded, the new engine is ready before the old one closes."""
        async with self._lock(name):
            for entry in self._registered(name):
                await self._load(entry)
                await self._set_loaded(entry, is_loaded=True)

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

    async def _serve(self, record: ModelRecord) -> Entry:
        await self._first_load(record.served_checkpoint)
        entry = Entry(name=record.name, version=record.version, record=record)
        await self._load(entry)
        try:
            await self._metadata.add_model(record)
        except BaseException:
            await self._unload(entry)
            raise
        self._entries.setdefault(record.name, {})[record.version] = entry
        return entry

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

    async def _first_load(self, checkpoint_id: str) -> None:
        arguments = {
            "path": str(self._checkpoints.path(checkpoint_id)),
            "threads": 1,
            "deadline_s": self._settings.infer_deadline_s,
        }
        await self._sandbox.run("load", arguments)

    async def _load(self, entry: Entry) -> None:
        assert entry.record is not None
        previous, entry.state = entry.loaded, "LOADING"
        try:
            path = self._checkpoints.path(entry.record.served_checkpoint)
            entry.loaded = await self._load_engine(path, entry.name, str(entry.version))
            entry.reason = ""
        except CheckpointError as error:
            entry.reason = str(error)
            raise
        finally:
            entry.state = "READY" if entry.loaded is not None else "UNAVAILABLE"
        if previous is not None:
            try:
                await previous.drain()
            finally:
                await previous.close()

    async def _unload(self, entry: Entry) -> None:
        engine, entry.loaded = entry.loaded, None
        entry.reason = "unloaded"
        if engine is not None:
            entry.state = "UNLOADING"
            try:
                await engine.close()
            finally:
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


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        expected = "1 to 128 letters, digits, dots, underscores, hyphens or spaces, the first a letter or digit"
        raise ParameterError("name", expected=expected, received=repr(name[:200]))
    if name == "stats" or name.startswith("normcore."):
        raise ConflictError(
            f"name: {name!r} is reserved; 'stats' and names that begin with 'normcore.' are the service's"
        )
