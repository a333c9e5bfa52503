"""What compiled kernels share: conversions of half precision, threads, and places to keep them."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

import normcore
from normcore import _values
from normcore._compiled import compiled, divide, flat
from normcore._values import load, store
from normcore.normalization import batch_norm

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@compiled
def _widen(values: Any, wide: Any) -> None:
    for index in range(values.size):
        wide[index] = load(values, index)


@compiled
def _narrow(wide: Any, values: Any) -> None:
    for index in range(wide.size):
        store(values, index, wide[index])


@compiled
def _double(values: Any) -> None:
    for index in range(values.size):
        values[index] *= 2.0


@compiled
def _soft_there_and_back(values: Any, wide: Any, output: Any) -> None:
    for index in range(values.size):
        wide[index] = _values._from_half(values[index])
        output[index] = _values._to_half(np.float32(wide[index]))


def _all_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def _between(values: Tensor) -> Tensor:
    """Every number, what lies half-way to the next, and a little to both sides of that."""
    finite = values[values.isfinite()].float().sort().values
    finite = finite[torch.cat([finite.diff() > 0, torch.tensor([True])])]
    halves = (finite[:-1].double() + finite.diff().double() / 2).float()
    near = [torch.nextafter(halves, torch.full_like(halves, end)) for end in (-torch.inf, torch.inf)]
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 3.4e38, -3.4e38, 1e-45])
    return torch.cat([finite, halves, *near, ends])


@HALVES
def test_every_value_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    values, wide = _all_of(dtype), torch.empty(2**16, dtype=torch.float64)
    _widen(flat(values), flat(wide))
    assert torch.equal(
        wide.nan_to_num(nan=-7.0, posinf=1e300, neginf=-1e300), values.double().nan_to_num(-7.0, 1e300, -1e300)
    )


@HALVES
def test_every_rounding_is_torch_s(dtype: torch.dtype) -> None:
    wide = _between(_all_of(dtype))
    output = torch.empty(len(wide), dtype=dtype)
    _narrow(flat(wide.double()), flat(output))
    assert torch.equal(
        output.float().nan_to_num(-7.0, 1e39, -1e39), wide.to(dtype).float().nan_to_num(-7.0, 1e39, -1e39)
    )


def test_float16_without_instructions_for_it_is_the_same() -> None:
    values = _all_of(torch.float16)
    wide, output = torch.empty(2**16, dtype=torch.float64), torch.empty_like(values)
    _soft_there_and_back(flat(values), flat(wide), flat(output))
    is_nan = values.isnan()
    assert torch.equal(wide[~is_nan], values.double()[~is_nan])
    assert bool(wide[is_nan].isnan().all())
    assert torch.equal(output[~is_nan].view(torch.int16), values[~is_nan].view(torch.int16))
    between = _between(values)
    rounded = torch.tensor([_values._to_half(np.float32(value)) for value in between[::5].tolist()], dtype=torch.int16)
    expected = between[::5].to(torch.float16)
    assert torch.equal(rounded.view(torch.float16).nan_to_num(-7.0), expected.nan_to_num(-7.0))


@pytest.fixture
def _two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_large_work_is_divided_among_threads() -> None:
    found = []

    def kernel(name: str, start: int, stop: int) -> None:
        found.append((name, start, stop, threading.get_ident()))

    divide(kernel, 7, 2**20, "x")
    assert sorted(part[:3] for part in found) == [("x", 0, 3), ("x", 3, 7)]
    assert len({part[3] for part in found}) == 2
    found.clear()
    divide(kernel, 7, 2**10, "x")
    assert [part[:3] for part in found] == [("x", 0, 7)]


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("failing", [0, 3], ids=["own part", "other part"])
def test_an_error_of_a_part_is_raised_when_all_have_ended(failing: int) -> None:
    ended = []

    def kernel(start: int, _stop: int) -> None:
        if start == failing:
            raise MemoryError
        ended.append(start)

    with pytest.raises(MemoryError):
        divide(kernel, 7, 2**20)
    assert ended == [3 - failing]


def _child() -> None:
    torch.set_num_threads(2)
    divide(lambda start, stop: None, 8, 2**20)
    os._exit(7)


@pytest.mark.usefixtures("_two_threads")
def test_a_forked_child_has_threads_of_its_own() -> None:
    divide(lambda start, stop: None, 8, 2**20)
    child = multiprocessing.get_context("fork").Process(target=_child)
    child.start()
    child.join(20)
    assert child.exitcode == 7


def _run(program: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", program]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    return found.stdout


_FOLDER = "from normcore._kept_code import folder; print(folder().name)"
_LAYER_NORM = (
    "import torch\n"
    "from normcore.normalization import layer_norm\n"
    "print(layer_norm(torch.tensor([[1.0, 3.0]]), eps=1e-12).output.tolist())"
)


def test_without_a_writable_directory_kernels_compile_all_the_same() -> None:
    assert _run(_LAYER_NORM, NUMBA_CACHE_DIR="/proc/nowhere").strip() == "[[-1.0, 1.0]]"


def test_machine_code_is_kept_in_a_folder_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        assert _run(_LAYER_NORM, NUMBA_CACHE_DIR=str(tmp_path)).strip() == "[[-1.0, 1.0]]"
    (kept,) = tmp_path.iterdir()
    assert list(kept.glob("*.code"))
    assert _run(_FOLDER, NUMBA_CACHE_DIR=str(tmp_path)).strip() == kept.name


@pytest.mark.parametrize("source", ["_sweeps.py", "_values.py", "_compiled.py", "normalization/vector_kernels.py"])
def test_kept_machine_code_belongs_to_these_sources(tmp_path: Path, source: str) -> None:
    """A release with other kernels must not find the code of this one, whichever file the change is in."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(normcore.__file__).parent, copy / "normcore")
    program, cache = f"import sys; sys.path.insert(0, {str(copy)!r})\n{_FOLDER}", str(tmp_path)
    before = _run(program, NUMBA_CACHE_DIR=cache)
    assert before == _run(_FOLDER, NUMBA_CACHE_DIR=cache)
    with (copy / "normcore" / source).open("a") as changed:
        changed.write("# another release\n")
    assert _run(program, NUMBA_CACHE_DIR=cache) != before


@pytest.mark.skipif(not get_host_cpu_features().get("avx512f"), reason="no vectors of 64 bytes")
def test_kernels_are_made_of_the_widest_vectors(tmp_path: Path) -> None:
    program = (
        "import numpy as np\n"
        "from normcore._column_loops import scale_rows\n"
        "rows = np.ones(256, np.float32)\n"
        "scale_rows(rows, rows, np.uintp(0), 256, *rows.reshape(4, 64)[:3])\n"
        "print(*('%zmm' in code for code in scale_rows.inspect_asm().values()))"
    )
    assert _run(program, NUMBA_CACHE_DIR=str(tmp_path)).strip() == "True"


def test_the_library_is_imported_without_the_compiler() -> None:
    program = "import sys, normcore.normalization, normcore.statistics.moments; print('numba' in sys.modules)"
    assert _run(program).strip() == "False"


def test_a_kernel_may_be_called_first_by_what_torch_compiles() -> None:
    def function(values: Tensor) -> Tensor:
        values = values + 1.0
        _double(flat(values))
        return values + 1.0

    assert torch.compile(function, backend="eager")(torch.ones(3)).tolist() == [5.0, 5.0, 5.0]


def test_what_torch_compiles_keeps_memory_that_kernels_have_addresses_of() -> None:
    running = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)

    def function(values: Tensor) -> Tensor:
        return batch_norm(values + 1.0, *running).output * 2.0

    values = torch.randn(6, 4, 5, dtype=torch.float64)
    assert torch.compile(function, backend="eager")(values).equal(function(values))
