"""Starts that cannot be: one line that names the setting, and an exit code."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from service.errors import StartError
from service.preflight import check_start, unknown_variables
from service.settings import Settings
from tests.server import running
from tests.service.conftest import small_settings


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
        ({"NORMSERVE_PORT": "x"}, 2, "NORMSERVE_PORT: Input should be a valid integer, unable to parse"),
        ({"NORMSERVE_DEVICE": "cuda:99"}, 3, "NORMSERVE_DEVICE: expected "),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, settings: dict[str, str], code: int, words: str) -> None:
    done = _start(tmp_path, **settings)
    assert done.returncode == code
    assert done.stderr.startswith(words)
    (value,) = settings.values()
    assert re.search(rf"received '?{value}'?\n$", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data_dir": Path("/proc/nowhere")}, "NORMSERVE_DATA_DIR: /proc/nowhere cannot be written: No such file"),
        ({"data_dir": Path(__file__)}, f"NORMSERVE_DATA_DIR: {__file__} cannot be written: it is a file"),
        ({"database_url": "sqlite:////nowhere/x.db"}, "NORMSERVE_DATABASE_URL: the database cannot be"),
        ({"database_url": "nonsense"}, "NORMSERVE_DATABASE_URL: "),
        ({"database_url": "oracle://x"}, "NORMSERVE_DATABASE_URL: "),
        ({"device": "tpu"}, "NORMSERVE_DEVICE: expected auto, cpu or cuda:N, received 'tpu'"),
        ({"host": "203.0.113.7"}, "NORMSERVE_HOST, NORMSERVE_PORT: cannot listen on 203.0.113.7"),
        ({"host": "no such host"}, "NORMSERVE_HOST: 'no such host' is no address"),
    ],
)
async def test_what_a_start_lacks_is_one_line(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StartError) as caught:
        await check_start(small_settings(tmp_path, port=0).model_copy(update=settings))
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


async def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError) as caught:
            await check_start(small_settings(tmp_path, port=port))
    sentence = f"NORMSERVE_HOST, NORMSERVE_PORT: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert str(caught.value) == sentence


async def test_a_newer_database_is_one_line(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, port=0, database_url=_newer_database(tmp_path))
    with pytest.raises(StartError) as caught:
        await check_start(settings)
    assert str(caught.value).startswith("NORMSERVE_DATABASE_URL: the database has schema version 999, this program")
    assert "\n" not in str(caught.value)


def test_unknown_variables_are_reported_with_what_was_meant() -> None:
    found = unknown_variables(["NORMSERVE_PROT", "NORMSERVE_PORT", "normserve_host", "PATH", "NORMSERVE_XYZZY_QUUX"])
    assert found == [
        "NORMSERVE_PROT: no such setting, did you mean NORMSERVE_PORT?",
        "NORMSERVE_XYZZY_QUUX: no such setting",
    ]


def test_an_unknown_variable_is_a_line_in_the_log(tmp_path: Path) -> None:
    done = _start(tmp_path, NORMSERVE_PROT="1", NORMSERVE_DEVICE="cuda:99")
    warning, problem = done.stderr.splitlines()
    assert json.loads(warning)["message"] == "NORMSERVE_PROT: no such setting, did you mean NORMSERVE_PORT?"
    assert problem.startswith("NORMSERVE_DEVICE: ")
    assert done.returncode == 3


async def test_auto_without_a_gpu_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    await check_start(Settings(data_dir=tmp_path / "data", port=0, device="auto"))
    assert "NORMSERVE_DEVICE: auto, but torch finds no GPU" in caplog.text


def test_a_service_that_warms_up_is_ready_with_its_kernels(tmp_path: Path) -> None:
    # On a machine that has never compiled them, and has others to serve, all kernels take minutes.
    with running(tmp_path / "data", {"NORMSERVE_WARM_UP": "true"}, patience_s=300) as server:
        body = {"input": [[1, 2], [3, 5]], "training": True}
        answer = httpx.post(f"{server.url}/v1/normalizations/batch_norm", json=body)
        assert answer.status_code == 200
        (compute_ms,) = re.findall(r"compute;dur=([\d.]+)", answer.headers["server-timing"])
        assert float(compute_ms) < 300  # the kernels of one call take a second to compile


def test_kernels_of_statistics_and_of_numbers_in_text_are_among_them(tmp_path: Path) -> None:
    """In a process of its own: in this one other tests have compiled them."""
    script = """if True:
        import asyncio, pathlib, sys
        from normcore import decimals
        from normcore.statistics import cells, sums
        from tests.service.conftest import http, running_app, small_settings

        async def main():
            settings = small_settings(pathlib.Path(sys.argv[1]), warm_up=True)
            async with running_app(settings) as app, http(app) as client:
                while (await client.get("/v2/health/ready")).status_code == 503:
                    await asyncio.sleep(0.1)
                print(*(len(kernel.signatures) for kernel in (sums.merge_block, cells.count_values, decimals._read)))

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "4 1 1\n", done.stderr


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


def test_a_first_call_is_compiled_by_another_process(tmp_path: Path) -> None:
    settings = {"NORMSERVE_COMPILE_S": "60", "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    with running(tmp_path / "data", settings) as server:
        answer = httpx.post(f"{server.url}/v1/normalizations/layer_norm", json={"input": [[1, 3]]}, timeout=120)
        assert answer.json()["outputs"]["output"]["data"] == pytest.approx([-1, 1], abs=1e-5)
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        assert {"normserve_kernels_kept 0", "normserve_kernels_compiled_total 0"} <= set(lines)
        assert server.stop() == 0
    said = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert [line["level"] for line in said if line["logger"] == "service.engine.compiler"] == ["info"]
