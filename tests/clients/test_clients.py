"""Unmodified clients of others judge the running service, each in an environment with pins of its own.

Nothing is skipped but NVIDIA's perf_analyzer, where its shared libraries cannot be had.
"""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.clients.environments import environment
from tests.server import Server
from tests.service.engine import graphs

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.save(graphs.doubling(), tmp_path_factory.mktemp("model"))


def _run(python: Path | str, script: str, *arguments: str | Path, **variables: str) -> None:
    command = [str(python), str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["triton_http.py", "triton_aio.py"])
def test_the_present_tritonclient(server: Server, model: Path, script: str) -> None:
    _run(sys.executable, script, server.address, model)


@pytest.mark.parametrize("script", ["triton_http.py", "triton_aio.py"])
def test_an_old_tritonclient(server: Server, model: Path, script: str) -> None:
    _run(environment("tritonclient-2.48") / "bin" / "python", script, server.address, model)


def test_kserve(server: Server) -> None:
    _run(environment("kserve-0.21") / "bin" / "python", "kserve_rest.py", server.address)


def test_a_client_generated_from_the_openapi_document(server: Server, tmp_path: Path) -> None:
    network = graphs.doubling()
    network.doc_string = "for the generated client alone"  # other tests upload the same network
    folder = environment("openapi-python-client")
    (tmp_path / "openapi.json").write_bytes(httpx.get(f"{server.url}/openapi.json").content)
    # The generator knows no media types but its own; ours are bytes.
    types = ("vnd.safetensors", "x-npy", "x-npz")
    lines = [f"  application/{name}: application/octet-stream" for name in types]
    (tmp_path / "config.yml").write_text("\n".join(["content_type_overrides:", *lines]))
    python = folder / "bin" / "python"
    command = [str(python), "-m", "openapi_python_client", "generate", "--meta", "none", "--fail-on-warning"]
    command += ["--path", "openapi.json", "--config", "config.yml", "--output-path", "normserve_client"]
    variables = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _run(python, "openapi_python_client.py", server.address, graphs.save(network, tmp_path), PYTHONPATH=str(tmp_path))


@pytest.mark.alone
@pytest.mark.perf_analyzer
@pytest.mark.parametrize("concurrency", [1, 64])
def test_perf_analyzer(server: Server, model: Path, concurrency: int) -> None:
    folder = environment("tritonclient-2.48")
    libraries = [_cuda_runtime(folder), *_libb64(folder)]
    variables = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    binary = folder / "bin" / "perf_analyzer"
    missing = subprocess.run(["ldd", str(binary)], env=variables, capture_output=True, text=True, check=True)
    if "not found" in missing.stdout:
        names = re.findall(r"(\S+) => not found", missing.stdout)
        pytest.skip(f"perf_analyzer needs {', '.join(names)}, which this machine cannot get")
    content = base64.b64encode(model.read_bytes()).decode()
    document = {"parameters": {"config": '{"max_batch_size": 16}', "file:1/model.onnx": content}}
    assert httpx.post(f"{server.url}/v2/repository/models/perf/load", json=document).status_code == 200
    options = ["-m", "perf", "-u", server.address, "--concurrency-range", str(concurrency)]
    options += ["--measurement-interval", "1000", "--stability-percentage", "90", "--max-trials", "10"]
    done = subprocess.run(
        [str(binary), *options], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Throughput:" in done.stdout, done.stdout + done.stderr
    assert "Failed" not in done.stdout


def _cuda_runtime(folder: Path) -> Path:
    return next(folder.glob("lib/python*/site-packages/nvidia/*/lib/libcudart.so.12")).parent


def _libb64(folder: Path) -> list[Path]:
    """The folder of libb64 out of Debian's package, where this machine has Debian's tools and their index."""
    if not list(folder.glob("usr/lib/*/libb64.so.0d")):
        try:
            subprocess.run(
                ["apt-get", "download", "libb64-0d"], cwd=folder, capture_output=True, check=True, timeout=60
            )
            package = next(folder.glob("libb64-0d_*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return []
    return [found.parent for found in folder.glob("usr/lib/*/libb64.so.0d")]
