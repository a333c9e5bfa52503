"""Writing a file whole: nobody ever reads half a checkpoint."""

import os
from collections.abc import Iterable
from pathlib import Path


def write_file(target: Path, content: bytes | Iterable[bytes]) -> None:
    """Write to a sibling file, flush it to the disk, then rename it into place."""
    pieces = (content,) if isinstance(content, bytes) else content
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["write_file"]
