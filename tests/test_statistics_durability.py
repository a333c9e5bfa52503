"""Statistics in the real process: killed at any moment it loses no answered post, and counts none twice."""

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.__main__ import main
from service.engine.sandbox import Sandbox
from tests.server import Server
from tests.service.statistics import NPY, npy

KILLS = 20
SERVICES = 4
WORKERS = 4
BATCH = 8
SETTINGS = {"NORMSERVE_THREADS": "1", "NORMSERVE_LOG_LEVEL": "warning"}


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["service.app"])  # twenty starts of the interpreter and its libraries cost a minute


def _serve(environment: dict[str, str], output: Path) -> None:
    """The service's own entry point, in a forked process."""
    os.environ.update(environment)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    Sandbox.start = _later  # type: ignore[assignment, method-assign]
    os._exit(main([]))


async def _later(_: Sandbox) -> None:
    """The sandbox starts with the first upload, of which there are none: every start would wait for it, for seconds."""


@contextmanager
def forked(folder: Path) -> Iterator[tuple[BaseProcess, str]]:
    """The service as a process of its own, and its address; killed at the end."""
    output = folder / "stdout"
    output.unlink(missing_ok=True)
    environment = {**SETTINGS, "NORMSERVE_PORT": "0", "NORMSERVE_DATA_DIR": str(folder / "data")}
    process = FORKS.Process(target=_serve, args=(environment, output))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not output.exists() or "documentation" not in output.read_text():
            assert process.is_alive(), "the service has ended"
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.01)
        yield process, output.read_text().split()[4].rstrip(",")
    finally:
        process.kill()
        process.join()


class Worker:
    """Posts batches of its own sequence, each until it is answered, and counts the answers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.answered = 0

    def batch(self, index: int) -> np.ndarray[Any, Any]:
        """Values that tell every batch of every worker apart."""
        return np.full((BATCH, 1, 2), 1000 * self.number + index, np.float32)

    def post(self, url: str, *, until: Callable[[], bool]) -> None:
        with httpx.Client(timeout=30) as client:
            while not until():
                headers = NPY | {"idempotency-key": f"{self.number}/{self.answered}"}
                try:
                    answer = client.post(f"{url}/batches", content=npy(self.batch(self.answered)), headers=headers)
                except httpx.TransportError:
                    return
                assert answer.status_code == 200, answer.text
                self.answered += 1


def test_twenty_kills_lose_no_answered_post_and_count_none_twice(tmp_path: Path) -> None:
    """Of several services at once; each has its own directory."""
    with ThreadPoolExecutor(SERVICES) as pool:
        found = pool.map(lambda number: _answered_over_kills(tmp_path / str(number)), range(SERVICES))
        assert sum(found) >= KILLS


def _answered_over_kills(folder: Path) -> int:
    """How many posts were answered, once it is shown that they were counted, and all of them once."""
    folder.mkdir()
    workers = [Worker(number) for number in range(WORKERS)]
    path = None
    for kill in range(KILLS // SERVICES):
        with forked(folder) as (process, url):
            path = path or httpx.post(f"{url}/v1/statistics", json={"num_features": 1}).headers["location"]
            _post_and_kill(process, workers, f"{url}{path}", after=1 + 2 * kill)
    answered = sum(worker.answered for worker in workers)
    with forked(folder) as (_, url):
        counted = httpx.get(f"{url}{path}").json()["batches"]
        assert answered <= counted <= answered + WORKERS, "only posts in flight may be lost"
        for worker in workers:  # the retry of what was in flight
            known = worker.answered + 1
            worker.post(f"{url}{path}", until=lambda worker=worker, known=known: worker.answered == known)  # type: ignore[misc]  # mypy sees no type of a lambda's default
        found = httpx.get(f"{url}{path}").json()
    values = np.concatenate([worker.batch(index) for worker in workers for index in range(worker.answered)])
    assert (found["batches"], found["count"]) == (answered + WORKERS, values.size)
    pooled = found["statistics"]["pooled"]
    np.testing.assert_allclose(pooled["mean"], values.mean(dtype=float), rtol=1e-12)
    np.testing.assert_allclose(pooled["var_biased"], values.var(dtype=float), rtol=1e-12)
    return answered


def _post_and_kill(process: BaseProcess, workers: list[Worker], url: str, *, after: int) -> None:
    """Kill it while all workers post, once they have got so many more answers."""
    enough = sum(worker.answered for worker in workers) + after
    with ThreadPoolExecutor(len(workers)) as pool:
        posting = [pool.submit(worker.post, url, until=lambda: not process.is_alive()) for worker in workers]
        while sum(worker.answered for worker in workers) < enough and not all(item.done() for item in posting):
            time.sleep(0.0005)
        process.kill()
        process.join()
        for item in posting:
            item.result()


def test_states_keys_and_frozen_copies_outlive_a_kill(tmp_path: Path) -> None:
    keyed = {"idempotency-key": "one"}
    with forked(tmp_path) as (_, url):
        path = httpx.post(f"{url}/v1/statistics", json={"num_features": 1}).headers["location"]
        old = httpx.get(f"{url}{path}").headers["etag"]
        first = httpx.post(f"{url}{path}/batches", json={"input": [[1], [3]]}, headers=keyed)
        assert first.status_code == 200, first.text
        read = httpx.get(f"{url}{path}")
        frozen = httpx.post(f"{url}{path}/freeze")
    with forked(tmp_path) as (_, url):
        assert httpx.get(f"{url}{path}", headers={"if-none-match": read.headers["etag"]}).status_code == 304
        again = httpx.post(f"{url}{path}/batches", json={"input": [[1], [3]]}, headers=keyed)
        assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")
        other = httpx.post(f"{url}{path}/batches", json={"input": [[1], [4]]}, headers=keyed)
        assert (other.status_code, other.json()["code"]) == (409, "conflict")
        stale = httpx.post(f"{url}{path}/batches", json={"input": [[1]]}, headers={"if-match": old})
        assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")
        copy = httpx.get(f"{url}{frozen.headers['location']}")
        assert (copy.json(), copy.headers["etag"]) == (frozen.json(), frozen.headers["etag"])
        assert httpx.get(f"{url}{path}").json() == read.json()
        counted = httpx.post(f"{url}{path}/batches", json={"input": [[1]]}, headers={"if-match": read.headers["etag"]})
        assert (counted.status_code, counted.json()["sequence"]) == (200, 2)


@pytest.fixture(scope="module")
def server_settings() -> dict[str, str]:
    return SETTINGS


def test_sixteen_clients_lose_nothing_and_count_nothing_twice(server: Server) -> None:
    made = httpx.post(f"{server.url}/v1/statistics", json={"num_features": 3}).json()["id"]
    url = f"{server.url}/v1/statistics/{made}/batches"
    arrays = [np.random.default_rng(index).normal(index, 1, (5, 3, 7)).astype(np.float32) for index in range(160)]

    def post(worker: int) -> list[int]:
        with httpx.Client(timeout=60) as client:
            sequences = []
            for index in range(worker, len(arrays), 16):
                for _ in range(2):  # every post is repeated by an anxious client
                    headers = NPY | {"idempotency-key": f"key {index}"}
                    answer = client.post(url, content=npy(arrays[index]), headers=headers)
                    assert answer.status_code == 200, answer.text
                sequences.append(answer.json()["sequence"])
            return sequences

    with ThreadPoolExecutor(16) as pool:
        sequences = [sequence for found in pool.map(post, range(16)) for sequence in found]
    assert sorted(sequences) == [*range(1, 161)]
    document = httpx.get(url.removesuffix("/batches")).json()
    together = np.concatenate(arrays).astype(float)
    assert (document["batches"], document["count"]) == (160, together[:, 0].size)
    pooled = document["statistics"]["pooled"]
    np.testing.assert_allclose(pooled["mean"], together.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(pooled["var_biased"], together.var((0, 2)), rtol=1e-12)


def test_a_large_stream_takes_little_memory_and_a_broken_one_changes_nothing(server: Server) -> None:
    made = httpx.post(f"{server.url}/v1/statistics", json={"num_features": 64}).json()["id"]
    url = f"{server.url}/v1/statistics/{made}"
    block = np.random.default_rng(0).normal(5, 2, (64, 64, 64)).astype(np.float32)
    blocks = 320  # of a MiB
    head = npy(np.empty((0, 64, 64), np.float32)).replace(b"(0, 64, 64)", f"({64 * blocks}, 64, 64)".encode())
    head = head[:10] + head[10:].rstrip() + b" " * (118 - len(head[10:].rstrip()) - 1) + b"\n"

    def stream(count: int) -> Iterator[bytes]:
        yield head
        for _ in range(count):
            yield block.tobytes()

    warm_up = httpx.post(f"{url}/batches", content=npy(block), headers=NPY, timeout=60)
    assert warm_up.status_code == 200, warm_up.text
    before = _peak_bytes(server.process)
    broken = httpx.post(f"{url}/batches", content=stream(blocks // 2), headers=NPY, timeout=60)
    assert (broken.status_code, broken.json()["code"]) == (400, "payload_malformed")
    assert httpx.get(url).json()["batches"] == 1
    whole = httpx.post(f"{url}/batches", content=stream(blocks), headers=NPY, timeout=60)
    assert whole.status_code == 200, whole.text
    assert _peak_bytes(server.process) - before < 64 * 2**20
    found = httpx.get(url).json()["statistics"]["pooled"]
    np.testing.assert_allclose(found["mean"], block.mean((0, 2), dtype=float), rtol=1e-12)
    np.testing.assert_allclose(found["var_biased"], block.var((0, 2), dtype=float), rtol=1e-12)


def _peak_bytes(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
