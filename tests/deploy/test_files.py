"""The container files agree with the package and with each other; what needs an engine is in make docker-test."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from deploy.requirements import requirements
from service import __version__
from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROMETHEUS = (ROOT / "deploy" / "prometheus.yml").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()


def _runtimes(listed: list[str]) -> list[str]:
    return [line for line in listed if line.startswith("onnxruntime")]


def test_an_image_has_one_onnxruntime_of_the_pinned_version() -> None:
    (pinned,) = re.findall(r"^onnxruntime==(\S+)$", CONSTRAINTS, re.MULTILINE)
    assert _runtimes(requirements("cpu", PROJECT, CONSTRAINTS)) == ["onnxruntime"]
    assert _runtimes(requirements("gpu", PROJECT, CONSTRAINTS)) == [f"onnxruntime-gpu[cuda,cudnn]=={pinned}"]


def test_both_images_have_everything_else_and_tracing() -> None:
    cpu, gpu = (requirements(device, PROJECT, CONSTRAINTS) for device in ("cpu", "gpu"))
    assert set(cpu) - set(_runtimes(cpu)) == set(gpu) - set(_runtimes(gpu))
    assert {"torch", "fastapi", "opentelemetry-sdk"} <= set(cpu)
    assert not {"pytest", "ruff"} & set(cpu)


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="DEVICE: expected cpu or gpu, received 'tpu'"):
        requirements("tpu", PROJECT, CONSTRAINTS)


def test_the_label_names_the_packages_version() -> None:
    assert re.findall(r"^ARG VERSION=(\S+)$", DOCKERFILE, re.MULTILINE) == [__version__]


def test_prometheus_scrapes_the_services_of_the_compose_file() -> None:
    services = set(re.findall(r"^  (normserve\S*):$", COMPOSE, re.MULTILINE))
    targets = re.findall(r"targets: \[(\S+):8000\]", PROMETHEUS)
    assert set(targets) == services == {"normserve", "normserve-gpu"}


def test_prometheus_asks_for_a_path_that_the_service_has(tmp_path: Path) -> None:
    (path,) = re.findall(r"metrics_path: (\S+)$", PROMETHEUS, re.MULTILINE)
    assert create_app(Settings(data_dir=tmp_path)).openapi()["paths"][path]["get"]["operationId"] == "read_metrics"
    assert "./deploy/prometheus.yml:/etc/prometheus/prometheus.yml:ro" in COMPOSE
    assert "EXPOSE 8000" in DOCKERFILE


def test_docker_test_fails_without_an_engine(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "-o", ".venv/.installed", "docker-test", "VENV=.venv", "DOCKER_SMOKE="]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "no container engine; start one or set DOCKER_SMOKE" in done.stderr
