"""Folding a state_dict beside copying and hashing the file: time as a ratio, and peak memory.

    python -m benchmarks.state_dict_folding [million weights]

The peer reads the file once, writes a copy, hashes it with SHA-256 and syncs it: what any tool must do that turns one
checkpoint into another and says which. A fold hashes every weight twice, as it was and as it is written, which the
report has to name, on a second thread while the first computes and writes: on a busy machine the ratio is that of the
work, about 2.4. Memory is the largest resident size beyond that of a process that has imported everything and folded a
small file.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from benchmarks.folding import peak_bytes
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
        for path in (source, small):
            torch.save(safetensors.torch.load_file(path), path.with_suffix(".pt"))
        for suffix in (".safetensors", ".pt"):
            _report(source.with_suffix(suffix), small.with_suffix(suffix))


def _report(source: Path, small: Path) -> None:
    def ours() -> object:
        return fold_state_dict(source, source.with_name("folded"), options=_OPTIONS)

    def peer() -> object:
        return _copy(source, source.with_name("copy"))

    seen = compare(ours, peer, seconds=20)
    command = [sys.executable, "-m", "benchmarks.state_dict_folding", "memory", str(small), str(source)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size_bytes = source.stat().st_size
    print(  # noqa: T201  # a benchmark speaks
        f"{source.suffix}, {size_bytes / 1e6:.0f} MB: fold {seen.ours_ms:.0f} ms, copy and hash {seen.peer_ms:.0f} ms, "
        f"ratio {seen.ratio:.2f} (quartiles {seen.low:.2f} to {seen.high:.2f}, goal 2); peak "
        f"memory {grown / size_bytes:.2f} x the file (goal 1.3)"
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
    before = peak_bytes()
    fold_state_dict(source, target, options=_OPTIONS)
    return peak_bytes() - before


if __name__ == "__main__":
    main()
