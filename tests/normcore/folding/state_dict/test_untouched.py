"""A fold costs what it changes: the other tensors of a file are not looked at, and pass in small pieces."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from normcore.folding.state_dict.fold import fold_state_dict, plan_state_dict
from normcore.folding.state_dict.options import StateDictOptions, Told
from tests.normcore.folding.state_dict.networks import save

LARGE_BYTES = 1 << 26
OPTIONS = StateDictOptions(pairs={"bn": Told("conv", eps=1e-5)})


def checkpoint(path: Path) -> Path:
    """A convolution with its batch norm beside two large tensors that have no part in it."""
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {"conv.weight": torch.randn(8, 3, 3, 3, generator=draw)}
    tensors |= {f"bn.{leaf}": torch.randn(8, generator=draw) for leaf in ("weight", "bias", "running_mean")}
    tensors["bn.running_var"] = torch.rand(8, generator=draw) + 0.5
    tensors |= {f"embedding{index}.weight": torch.rand(LARGE_BYTES // 8, 1, generator=draw) for index in range(2)}
    return save(tensors, path)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_plan_reads_no_tensor_that_stays(suffix: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / f"in{suffix}")
    before = bytes_read()
    assert plan_state_dict(source, options=OPTIONS).count("told") == 1
    assert bytes_read() - before < 1 << 20


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_fold_holds_a_small_part_of_what_it_copies(suffix: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / f"in{suffix}")
    tracemalloc.start()
    try:
        assert fold_state_dict(source, tmp_path / "out.safetensors", options=OPTIONS).folded == 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < LARGE_BYTES / 4
