"""What must hold before the service starts, so that a wrong setting is one line and not a trace."""

import difflib
import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import sqlalchemy as sql

from normcore.errors import ParameterError
from service.engine.devices import torch_device
from service.errors import SchemaTooNewError, StartError
from service.settings import Settings
from service.storage.metadata import Metadata, database_url
from service.tracing import Tracing

log = logging.getLogger(__name__)

_PREFIX = "NORMSERVE_"
_LOCK = "normserve.lock"
# A killed process lets go of its files a little after whoever waited for it has seen it end.
_PATIENCE_S = 2.0
_RETRY_S = 0.05


async def check_start(settings: Settings) -> None:
    """Try the device, the data directory, the database, the address and the collector of traces. Raises StartError."""
    _check_device(settings.device)
    _check_data_dir(settings.data_dir)
    await _check_database(settings)
    _check_address(settings.host, settings.port)
    if settings.otlp_endpoint:
        Tracing.open(settings.otlp_endpoint).close()


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """The data directory for this process alone, whatever database is set: files in it are. Raises StartError."""
    _check_data_dir(folder)
    with (folder / _LOCK).open("a") as file:
        _lock(file, folder)
        yield


def unknown_variables(names: Iterable[str]) -> list[str]:
    """A sentence for each variable that has our prefix and is no setting."""
    known = [f"{_PREFIX}{field.upper()}" for field in Settings.model_fields]
    found = []
    for name in sorted(names):
        if name.upper().startswith(_PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            found.append(f"{name}: no such setting" + (f", did you mean {near[0]}?" if near else ""))
    return found


def _check_device(device: str) -> None:
    try:
        found = torch_device(device)
    except ParameterError as error:
        raise StartError("NORMSERVE_DEVICE", f"expected {error.expected}, received {error.received}") from error
    if device == "auto" and found.type == "cpu":
        log.warning("NORMSERVE_DEVICE: auto, but torch finds no GPU: normalization is computed on the CPU")


def _check_data_dir(folder: Path) -> None:
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise StartError("NORMSERVE_DATA_DIR", f"{folder} cannot be written: {reason}") from error


def _lock(file: TextIO, folder: Path) -> None:
    """The system lets go of the lock when the process ends, however it ends."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                problem = f"{folder} is in use by another normserve; give each one its own, or stop the other"
                raise StartError("NORMSERVE_DATA_DIR", problem) from error
            time.sleep(_RETRY_S)
        except OSError as error:
            raise StartError("NORMSERVE_DATA_DIR", f"{folder} cannot be locked: {error.strerror}") from error


async def _check_database(settings: Settings) -> None:
    name = "NORMSERVE_DATABASE_URL" if settings.database_url else "NORMSERVE_DATA_DIR"
    try:
        metadata = Metadata(database_url(settings.database_url, settings.data_dir))
    except (sql.exc.ArgumentError, ImportError) as error:  # no URL, or a driver that is not installed
        raise StartError(name, str(error)) from error
    try:
        await metadata.open()
    except SchemaTooNewError as error:
        raise StartError(name, error.message) from error
    except sql.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise StartError(name, f"the database cannot be opened: {reason}") from error
    finally:
        await metadata.close()


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StartError("NORMSERVE_HOST", f"{host!r} is no address of this machine: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StartError("NORMSERVE_HOST, NORMSERVE_PORT", f"cannot listen on {host}:{port}: {reason}") from error
