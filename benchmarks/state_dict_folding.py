"""Folding a state_dict beside copying and hashing the file: time as a ratio, and peak memory.

    python -m benchmarks.state_dict_folding [million weights]

The peer reads the file once, writes a copy, hashes it with SHA-256 and syncs it: what any tool must do that turns one
checkpoint into another and says which. Memory is the largest resident size beyond that of a process that has
imported everything and folded a small file.
"""

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import compare
from normcore.checkpoints.safetensors_writer import Computed, write_safetensors
from normcore.folding.state_dict.fold import fold_state_dict
from normcore.folding.state_dict.options import StateDictOptions

_BLOCK_BYTES = 1 << 22
_CHANNELS = 512
_OPTIONS = StateDictOptions(accept_assumed=True, eps=1e-5)


def main() -> None:
    if sys.argv[1:2] == ["memory"]:
        print(_measure_memory(Path(sys.argv[2]), Path(sys.argv[3])))  # noqa: T201  # the parent reads it
        return
    millions = int(sys.argv[1]) if sys.argv[1:] else 50
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, small = folder / "source.safetensors", folder / "small.safetensors"
        _write(source, pairs=max(millions * 10**6 // (_CHANNELS * 500 * 9), 1))
        _write(small, pairs=1)
        size_bytes = source.stat().st_size
        seen = compare(
            lambda: fold_state_dict(source, folder / "folded", options=_OPTIONS),
            lambda: _copy(source, folder / "copy"),
            seconds=20,
        )
        command = [sys.executable, "-m", "benchmarks.state_dict_folding", "memory", str(small), str(source)]
        grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(  # noqa: T201  # a benchmark speaks
            f"{size_bytes / 1e6:.0f} MB: fold {seen.ours_ms:.0f} ms, copy and hash {seen.peer_ms:.0f} ms, ratio "
            f"{seen.ratio:.2f} (quartiles {seen.low:.2f} to {seen.high:.2f}); peak memory {grown / size_bytes:.2f} x "
            "the file"
        )


def _write(path: Path, *, pairs: int) -> None:
    """Convolutions of 512 x 500 x 3 x 3, each with its batch norm."""
    generator = np.random.default_rng(0)
    tensors: dict[str, Computed] = {}

    def add(key: str, array: np.ndarray) -> None:
        tensors[key] = Computed("F32", array.shape, lambda file: iter([array.astype(np.float32)]))

    block = generator.standard_normal((_CHANNELS, 500, 3, 3), np.float32)
    for index in range(pairs):
        tensors[f"layer{index}.conv.weight"] = Computed(
            "F32",
            block.shape,
            lambda file, index=index: iter([np.roll(block, index + 1, axis=0)]),  # type: ignore[misc]  # a default binds the loop's value
        )
        for leaf in ("weight", "bias", "running_mean"):
            add(f"layer{index}.bn.{leaf}", generator.standard_normal(_CHANNELS))
        add(f"layer{index}.bn.running_var", generator.uniform(0.1, 2, _CHANNELS))
    anything = Path(__file__)
    write_safetensors(anything, path, tensors, metadata=dict)


def _copy(source: Path, target: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            writing.write(block)
            digest.update(block)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()


def _measure_memory(small: Path, source: Path) -> int:
    target = source.with_name("measured")
    fold_state_dict(small, target, options=_OPTIONS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fold_state_dict(source, target, options=_OPTIONS)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    main()
