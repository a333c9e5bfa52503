import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from service.engine.threads import cgroup_quota, thread_budget, use_one_thread


def _files(mount: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V2 = "0::/kubepods/pod1\n"
V1 = "4:cpu,cpuacct:/docker/abc\n3:cpuset:/\n1:name=systemd:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param(V2, {"kubepods/pod1/cpu.max": "150000 100000\n"}, 1.5, id="v2"),
        pytest.param(V2, {"kubepods/pod1/cpu.max": "max 100000\n"}, None, id="v2 without a limit"),
        pytest.param(
            V2,
            {"kubepods/cpu.max": "200000 100000\n", "kubepods/pod1/cpu.max": "400000 100000\n"},
            2.0,
            id="v2, the parent is tighter",
        ),
        pytest.param(V2, {"cpu.max": "50000 100000\n"}, 0.5, id="v2 of a container, whose path is the host's"),
        pytest.param(
            V1,
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            3.0,
            id="v1",
        ),
        pytest.param(
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            None,
            id="v1 without a limit",
        ),
        pytest.param(V1, {"cpuset/cpu.max": "1 100000\n"}, None, id="other controllers say nothing"),
        pytest.param("", {}, None, id="no cgroups"),
    ],
)
def test_quota_is_the_tightest_of_the_cgroups(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    (tmp_path / "membership").write_text(membership)
    _files(tmp_path / "mount", files)

    assert cgroup_quota(tmp_path / "mount", tmp_path / "membership") == expected


def test_quota_without_files_is_unlimited(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path / "nothing", tmp_path / "nowhere") is None


def test_budget_is_the_setting_if_there_is_one() -> None:
    assert thread_budget(7) == 7


def test_budget_is_at_least_one_and_within_the_affinity() -> None:
    assert 1 <= thread_budget(0) <= len(os.sched_getaffinity(0))


def test_one_thread_for_the_caller_leaves_the_others_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(1) as other:
            assert [pool.submit(torch.get_num_threads).result() for pool in (alone, other)] == [2, 2]
            alone.submit(use_one_thread).result()
            assert [pool.submit(torch.get_num_threads).result() for pool in (alone, other)] == [1, 2]
            alone.submit(torch.ones(2**20).sum).result()  # which would start the others
            assert alone.submit(torch.get_num_threads).result() == 1
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("changes", "is_spinning"), [({}, False), ({"OMP_WAIT_POLICY": "ACTIVE"}, True)], ids=str)
def test_threads_of_the_service_wait_without_spinning(changes: dict[str, str], is_spinning: bool) -> None:
    """As torch's own OpenMP says when it is loaded."""
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = others | {"OMP_DISPLAY_ENV": "verbose"} | changes
    command = [sys.executable, "-c", "import service.app"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if found is None:
        pytest.skip("torch has another OpenMP than GNU's")
    assert (found[1] != "0") == is_spinning
