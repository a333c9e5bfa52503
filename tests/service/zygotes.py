"""Services in this process share the one that forks their sandboxes' children: it takes seconds to start."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from service.engine import sandbox_process

_Running = sandbox_process._Running
_started: dict[tuple[str, ...], _Running] = {}


class _Shared(_Running):
    """The process that was started with the same arguments, if it lives; it ends with this one."""

    def __init__(self, arguments: list[str]) -> None:
        key = tuple(arguments)
        if key not in _started or not _started[key].is_alive():
            _started[key] = _Running(arguments)
        vars(self).update(vars(_started[key]))

    def close(self) -> None:
        pass


@contextmanager
def shared_zygotes() -> Iterator[None]:
    """For the start of a service."""
    with patch.object(sandbox_process, "_Running", _Shared):
        yield
