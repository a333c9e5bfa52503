"""Starts that cannot be: one line that names the setting, and an exit code."""

import os
import re
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from service.preflight import check_start, unknown_variables
from service.settings import Settings
from tests.server import running


def _start(tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "NORMSERVE_PORT": "0", "NORMSERVE_DATA_DIR": str(tmp_path / "data"), **settings}
    variables.pop("NORMSERVE_TEST_CACHE", None)
    command = [sys.executable, "-m", "service"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def _newer_database(tmp_path: Path) -> str:
    path = tmp_path / "newer.db"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE schema_version (version INTEGER); INSERT INTO schema_version VALUES (999);")
    connection.close()
    return f"sqlite:///{path}"


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"NORMSERVE_PORT": "x"}, 2, "NORMSERVE_PORT"),
        ({"NORMSERVE_QUEUE_SIZE": "0"}, 2, "NORMSERVE_QUEUE_SIZE"),
        ({"NORMSERVE_DATA_DIR": "/proc/nowhere"}, 3, "NORMSERVE_DATA_DIR: /proc/nowhere cannot be written"),
        ({"NORMSERVE_DATABASE_URL": "sqlite:////nowhere/x.db"}, 3, "NORMSERVE_DATABASE_URL: the database cannot be"),
        ({"NORMSERVE_DATABASE_URL": "nonsense"}, 3, "NORMSERVE_DATABASE_URL: "),
        ({"NORMSERVE_DATABASE_URL": "oracle://x"}, 3, "NORMSERVE_DATABASE_URL: "),
        ({"NORMSERVE_DEVICE": "cuda:99"}, 3, "NORMSERVE_DEVICE: expected "),
        ({"NORMSERVE_DEVICE": "tpu"}, 3, "NORMSERVE_DEVICE: expected auto, cpu or cuda:N, received 'tpu'"),
        ({"NORMSERVE_HOST": "203.0.113.7"}, 3, "NORMSERVE_HOST, NORMSERVE_PORT: cannot listen on 203.0.113.7"),
        ({"NORMSERVE_HOST": "no such host"}, 3, "NORMSERVE_HOST: 'no such host' is no address"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, settings: dict[str, str], code: int, words: str) -> None:
    done = _start(tmp_path, **settings)
    assert done.returncode == code
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _start(tmp_path, NORMSERVE_PORT=str(port))
    assert done.returncode == 3
    assert done.stderr == f"NORMSERVE_HOST, NORMSERVE_PORT: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_newer_database_is_one_line(tmp_path: Path) -> None:
    done = _start(tmp_path, NORMSERVE_DATABASE_URL=_newer_database(tmp_path))
    assert done.returncode == 3
    assert done.stderr.startswith("NORMSERVE_DATABASE_URL: the database has schema version 999, this program knows")
    assert done.stderr.count("\n") == 1


def test_unknown_variables_are_reported_with_what_was_meant() -> None:
    found = unknown_variables(["NORMSERVE_PROT", "NORMSERVE_PORT", "normserve_host", "PATH", "NORMSERVE_XYZZY_QUUX"])
    assert found == [
        "NORMSERVE_PROT: no such setting, did you mean NORMSERVE_PORT?",
        "NORMSERVE_XYZZY_QUUX: no such setting",
    ]


async def test_auto_without_a_gpu_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    await check_start(Settings(data_dir=tmp_path / "data", port=0, device="auto"))
    assert "NORMSERVE_DEVICE: auto, but torch finds no GPU" in caplog.text


def test_a_service_that_warms_up_is_ready_with_its_kernels(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"NORMSERVE_WARM_UP": "true"}) as server:
        body = {"input": [[1, 2], [3, 5]], "training": True}
        answer = httpx.post(f"{server.url}/v1/normalizations/batch_norm", json=body)
        assert answer.status_code == 200
        (compute_ms,) = re.findall(r"compute;dur=([\d.]+)", answer.headers["server-timing"])
        assert float(compute_ms) < 300  # the kernels of one call take a second to compile


def test_a_data_directory_in_use_is_one_line_and_free_after_a_kill(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server:
        staged = tmp_path / "data" / "staging" / "upload"
        staged.touch()
        done = _start(tmp_path)
        assert done.returncode == 3
        assert done.stderr.startswith(f"NORMSERVE_DATA_DIR: {tmp_path / 'data'} is in use by another normserve")
        assert done.stderr.count("\n") == 1
        assert staged.exists(), "what the first one is receiving stays"
        server.process.kill()
        with running(tmp_path / "data"):
            assert not staged.exists()
