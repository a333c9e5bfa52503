"""The one thread budget of the process, shared by torch and onnxruntime."""

import os
import threading
from pathlib import Path

import torch


def thread_budget(setting: int) -> int:
    """`setting` if it is positive, else the CPUs this process may use: the smaller of affinity and cgroup quota.

    A quota of 1.5 CPUs gives one thread: the half that is left is what the event loop runs on.
    """
    if setting > 0:
        return setting
    quota = cgroup_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    cpus = len(os.sched_getaffinity(0))
    return max(1, cpus if quota is None else min(cpus, int(quota)))


def use_one_thread() -> None:
    """Have torch compute in the calling thread alone from now on; other threads keep theirs.

    Torch has one number for all threads, which each takes over at its first call and keeps (with OpenMP).
    """
    others = torch.get_num_threads()
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
    restoring.start()
    restoring.join()


def cgroup_quota(mount: Path, membership: Path) -> float | None:
    """CPUs that the cgroups (v2 or v1) of a process allow, None without a limit.

    Args:
        mount: where the cgroup file systems are mounted.
        membership: the process's `/proc/<pid>/cgroup`.
    """
    quotas = [quota for folder in _cgroup_folders(mount, membership) if (quota := _folder_quota(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_folders(mount: Path, membership: Path) -> list[Path]:
    """The process's cgroups and all their ancestors: each may hold a limit.

    In a container the path of the host may not exist below the mount; its ancestors, down to the mount, still do.
    """
    folders = []
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / controllers if controllers else mount
        cgroup = root / path.lstrip("/")
        folders += [cgroup, *(parent for parent in cgroup.parents if parent.is_relative_to(root))]
    return folders


def _folder_quota(folder: Path) -> float | None:
    words = " ".join(_lines(folder / "cpu.max")).split()
    if not words:
        words = _lines(folder / "cpu.cfs_quota_us") + _lines(folder / "cpu.cfs_period_us")
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
