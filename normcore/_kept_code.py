"""Machine code of compiled kernels on the disk: a file for each kernel, its datatypes and a processor.

The compiler's own cache keeps an index per kernel: two processes that write it at once can leave one's code under the
name of the other's, and a file that was cut off fails every call from then on. Here a file's name is a digest of all
that its code depends on, and its first bytes are a digest of the rest: files share nothing, and what is not whole is
compiled again. Nothing that goes wrong on the disk fails a call.
"""

import hashlib
import inspect
import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

log = logging.getLogger(__name__)

_DIGEST_BYTES = 32
# Code of other releases, which nobody has used for so long, is removed; so is what a killed process left half-written.
_UNUSED_S = 30 * 24 * 3600.0
_CUT_OFF_S = 3600.0

Elsewhere = Callable[[str, str, Any], bool]


class KeptCode:
    """What numba asks for the code of one kernel before it compiles it, and hands the code to afterwards."""

    elsewhere: ClassVar[Elsewhere | None] = None
    asked: ClassVar[set[str]] = set()
    compiled_here: ClassVar[int] = 0

    def __init__(self, function: Callable[..., Any]) -> None:
        # Read when the functions are: what is written later is not what they are.
        self._function, self._source = function, _digest_of_file(inspect.getfile(function))
        folder()

    @property
    def cache_path(self) -> str:
        return str(folder())

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The kernel's code for these types of arguments; None where it is to be compiled."""
        context.refresh()
        name = self._name(signature, context.codegen())
        found = _rebuilt(name, context)
        asks = KeptCode.elsewhere
        if found is None and asks is not None and asks(self._function.__module__, self._function.__name__, signature):
            found = _rebuilt(name, context)
        KeptCode.asked.add(name)
        KeptCode.compiled_here += found is None
        return found

    def save_overload(self, signature: Any, found: Any) -> None:
        """Keep what was compiled, where it can be."""
        from numba.core.serialize import dumps

        kept = folder()
        if kept is None or found.lifted or found.library.has_dynamic_globals:
            return
        content = dumps(found._reduce())  # type: ignore[no-untyped-call]  # numba has no types
        path = kept / self._name(signature, found.codegen)
        part = path.with_suffix(f".part{os.getpid()}")
        try:
            kept.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(content).digest() + content)
            part.replace(path)
        except OSError as error:
            log.warning("the code of a kernel cannot be kept: %s", error)
            with suppress(OSError):
                part.unlink()

    def flush(self) -> None:
        """Called by numba before it compiles anew; what it saves then replaces what is kept."""

    def _name(self, signature: Any, codegen: Any) -> str:
        function = self._function
        depends = (function.__module__, function.__qualname__, self._source, signature, codegen.magic_tuple())
        return f"{function.__name__}-{_digest_of(repr(depends).encode())[:32]}.code"


@contextmanager
def compiled_elsewhere(elsewhere: Elsewhere) -> Iterator[None]:
    """Have another process compile what is not kept: told module, kernel and types, `elsewhere` says whether it is now.

    It is called by the thread that calls the kernel, one at a time.
    """
    KeptCode.elsewhere = elsewhere
    try:
        yield
    finally:
        KeptCode.elsewhere = None


@cache
def folder() -> Path | None:
    """Where machine code is kept: where all of it is, for this processor, or else is writable; None if nowhere is.

    Its name is a digest of how kernels are compiled, and of all of them: one that is compiled into another changes that
    one's code too.
    """
    sources = [Path(__file__).with_name("_compiled.py")]
    sources += sorted(path for path in Path(__file__).parent.rglob("*.py") if b"_compiled" in path.read_bytes())
    libraries = (version("numba"), version("llvmlite"), sys.implementation.cache_tag)
    name = f"kernels-{_digest_of(b''.join(path.read_bytes() for path in sources), repr(libraries).encode())[:16]}"
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    bases = [Path(chosen)] if chosen else [Path(__file__).parent / "__pycache__", Path.home() / ".cache/normcore"]
    writable = (base / name for base in bases if _is_writable(base / name))
    found = next((base / name for base in bases if has_all(base / name)), None) or next(writable, None)
    if found is not None:
        with suppress(OSError):
            os.utime(found)  # the day of its last use
        _remove_unused(found)
    return found


def has_all(kept: Path) -> bool:
    """Whether the code that `mark_all` has listed is there."""
    try:
        return {path.name for path in kept.iterdir()}.issuperset(_list_of(kept).read_text().split())
    except OSError:
        return False


def mark_all(kept: Path) -> bool:
    """List what this process has asked for as all that there is for this processor, if it is there."""
    path = _list_of(kept)
    if not {found.name for found in kept.iterdir()}.issuperset(KeptCode.asked):
        return False
    part = path.with_suffix(f".part{os.getpid()}")
    part.write_text("\n".join(sorted(KeptCode.asked)))
    part.replace(path)
    return True


def _list_of(kept: Path) -> Path:
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    own = (features, os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES"))
    processor = (binding.get_process_triple(), binding.get_host_cpu_name(), *own)
    return kept / f"all-{_digest_of(repr(processor).encode())[:16]}.list"


def _rebuilt(name: str, context: Any) -> Any:
    from numba.core.compiler import CompileResult

    content = _content(name)
    if content is None:
        return None
    try:
        return CompileResult._rebuild(context, *pickle.loads(content))  # type: ignore[no-untyped-call]  # no types
    except Exception:  # whatever is wrong with it, it can be compiled
        log.warning("%s cannot be used, and is compiled again", name, exc_info=True)
        return None


def _content(name: str) -> bytes | None:
    kept = folder()
    try:
        content = b"" if kept is None else (kept / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("the code of a kernel cannot be read: %s", error)
        return None
    digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if kept is not None and hashlib.sha256(content).digest() != digest:
        log.warning("%s is damaged, and is compiled again", kept / name)
        return None
    return content or None


def _is_writable(kept: Path) -> bool:
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(kept, os.W_OK)


def _remove_unused(kept: Path) -> None:
    """Other releases' folders, beside this one, that were not used for long, and files in it that were cut off."""
    now = time.time()
    with suppress(OSError):
        for other in kept.parent.glob("kernels-*"):
            if other != kept and now - other.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)
        for part in kept.glob("*.part*"):
            if now - part.stat().st_mtime > _CUT_OFF_S:
                part.unlink()


@cache
def _digest_of_file(path: str) -> str:
    return _digest_of(Path(path).read_bytes())


def _digest_of(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()
