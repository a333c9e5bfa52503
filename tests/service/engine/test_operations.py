"""The operations, called directly, and those that need a child's limits, in a child."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import pytest_asyncio

from normcore.errors import CheckpointError
from service.engine.operations import OPERATIONS
from service.engine.sandbox import Sandbox
from tests.service.engine import graphs

LIMITS = {
    "graph": {"max_nodes": 1000, "max_tensor_bytes": 2**24},
    "tensors": {"max_tensors": 1000, "max_header_bytes": 2**20, "max_bytes": 2**30},
}
VERIFY = {"count": 6, "seed": 0, "deadline_s": 20.0, "threads": 1}


def _run(operation: str, **arguments: Any) -> dict[str, Any]:
    """As a child would: everything goes through JSON."""
    result = OPERATIONS[operation](json.loads(json.dumps(arguments)), lambda *_: None)
    found: dict[str, Any] = json.loads(json.dumps(result))
    return found


def _load_arguments(path: Path, *, deadline_s: float = 5.0) -> dict[str, Any]:
    return {"path": str(path), "threads": 1, "deadline_s": deadline_s, "optimization": "all"}


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return graphs.save(graphs.convolution_with_batch_norm(), tmp_path)


def test_inspect_tells_what_the_file_is_and_what_folds(network: Path) -> None:
    found = _run("inspect", path=str(network), limits=LIMITS, options={})

    assert found["format"] == "onnx"
    assert found["summary"]["operators"] == {"BatchNormalization": 1, "Conv": 1}
    assert [(entry["normalization"], entry["status"], entry["into"]) for entry in found["normalizations"]] == [
        ("norm", "foldable", "conv")
    ]


def test_inspect_holds_the_limits_it_is_given(network: Path) -> None:
    with pytest.raises(CheckpointError, match="1"):
        _run("inspect", path=str(network), limits=LIMITS | {"graph": LIMITS["graph"] | {"max_nodes": 1}}, options={})


def test_fold_writes_the_folded_file_and_compare_agrees(network: Path, tmp_path: Path) -> None:
    target = tmp_path / "folded.onnx"

    report = _run("fold", source=str(network), target=str(target), limits=LIMITS, options={}, verify=VERIFY)
    certificate = _run("compare", original=str(network), other=str(target), limits=LIMITS, verify=VERIFY)

    assert report["folded"] == 1
    assert report["certificate"]["verdict"] == certificate["verdict"] == "equivalent"
    assert [node.op_type for node in onnx.load(target).graph.node] == ["Conv"]


def test_fold_without_verification_has_no_certificate(network: Path, tmp_path: Path) -> None:
    target = tmp_path / "folded.onnx"
    report = _run("fold", source=str(network), target=str(target), limits=LIMITS, options={}, verify=None)
    assert (report["folded"], report["certificate"]) == (1, None)


def test_load_describes_the_graph_and_runs_it_once(network: Path) -> None:
    found = _run("load", **_load_arguments(network))

    assert found.pop("rows")["are_independent"]
    assert found.pop("is_cost_known")
    (shape,) = found.pop("shapes").values()
    assert (len(shape), shape[1]) == (4, 3)
    assert found == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, -1, -1]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4, -1, -1]}],
        "warm_up": None,
    }


def test_load_accepts_a_graph_that_no_probe_fits_and_says_so(tmp_path: Path) -> None:
    assert "tensors of numbers only" in _run("load", **_load_arguments(graphs.save(graphs.text(), tmp_path)))["warm_up"]


def test_load_finds_costs_that_depend_on_the_data(tmp_path: Path) -> None:
    path = graphs.save(graphs.repeated_as_often_as_the_input_says(), tmp_path)
    assert not _run("load", **_load_arguments(path))["is_cost_known"]


def test_load_finds_rows_that_depend_on_their_company(tmp_path: Path) -> None:
    path = graphs.save(graphs.centered_over_the_batch(), tmp_path)
    rows = _run("load", **_load_arguments(path))["rows"]
    assert not rows["are_independent"]
    assert "more than 8" in rows["sentence"]


def test_load_refuses_training_mode(tmp_path: Path) -> None:
    path = graphs.save(graphs.batch_norm(training=True), tmp_path)
    with pytest.raises(CheckpointError, match="training mode"):
        _run("load", **_load_arguments(path))
    assert _run("load", **_load_arguments(graphs.save(graphs.batch_norm(training=False), tmp_path)))["inputs"]


def test_load_refuses_a_graph_that_does_not_end(tmp_path: Path) -> None:
    path = graphs.save(graphs.endless_loop(), tmp_path)
    with pytest.raises(CheckpointError, match=r"did not end within 0\.2 s"):
        _run("load", **_load_arguments(path, deadline_s=0.2))


def test_load_tells_a_lack_of_memory_from_inputs_that_do_not_fit(tmp_path: Path) -> None:
    path = graphs.save(graphs.memory_bomb(side=2**24), tmp_path)  # more than there are addresses
    with pytest.raises(MemoryError):
        _run("load", **_load_arguments(path))


def _zygote_threads() -> list[int]:
    """Threads of each process that forks children for this one."""
    tasks = Path("/proc/self/task").iterdir()
    processes = [Path(f"/proc/{pid}") for task in tasks for pid in (task / "children").read_text().split()]
    zygotes = [process for process in processes if b"service.engine.zygote" in (process / "cmdline").read_bytes()]
    return [len(list((zygote / "task").iterdir())) for zygote in zygotes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[Sandbox]:
    sandbox = Sandbox(memory_bytes=2**30, deadline_s=10, slots=1, queue=1)
    await sandbox.start()
    yield sandbox
    await sandbox.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_child_folds_and_reports_its_steps(sandbox: Sandbox, network: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    arguments = {
        "source": str(network),
        "target": str(tmp_path / "folded.onnx"),
        "limits": LIMITS,
        "options": {},
        "verify": VERIFY,
    }
    report = await sandbox.run("fold", arguments, progress=lambda *step: steps.append(step))

    assert report["certificate"]["verdict"] == "equivalent"
    assert steps


@pytest.mark.asyncio(loop_scope="module")
async def test_graph_that_takes_gigabytes_is_refused_by_the_memory_limit(sandbox: Sandbox, tmp_path: Path) -> None:
    path = graphs.save(graphs.memory_bomb(side=2**15), tmp_path)  # 4 GiB
    with pytest.raises(CheckpointError, match=r"1073741824 bytes of memory .NORMSERVE_SANDBOX_MEMORY_BYTES"):
        await sandbox.run("load", _load_arguments(path))


@pytest.mark.asyncio(loop_scope="module")
async def test_process_that_forks_is_single_threaded(sandbox: Sandbox, tmp_path: Path) -> None:
    await sandbox.run("load", _load_arguments(graphs.save(graphs.doubling(), tmp_path)))
    assert set(_zygote_threads()) == {1}  # of every sandbox in this process tree


async def test_graph_that_never_ends_is_killed_at_the_sandboxs_deadline(tmp_path: Path) -> None:
    sandbox = Sandbox(memory_bytes=2**30, deadline_s=1, slots=1, queue=1)
    await sandbox.start()
    began = time.monotonic()
    path = graphs.save(graphs.endless_loop(), tmp_path)
    with pytest.raises(CheckpointError, match=r"longer than 1 s .NORMSERVE_SANDBOX_DEADLINE_S"):
        await asyncio.wait_for(sandbox.run("load", _load_arguments(path, deadline_s=60)), 20)
    assert time.monotonic() - began < 5
    await sandbox.close()
