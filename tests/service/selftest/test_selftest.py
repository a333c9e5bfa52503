"""The self-test: passes here, and fails where something is wrong."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from normcore.normalization import METHODS
from service.__main__ import main
from service.selftest.check import Check
from service.selftest.formulas import CASES
from service.selftest.normalizations import check_normalizations


def _service(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False)


def test_every_method_passes_forward_and_backward() -> None:
    checks = list(check_normalizations("cpu"))
    assert [check.name for check in checks] == [f"{name} {way}" for name in METHODS for way in ("forward", "backward")]
    assert [check for check in checks if check.problem] == []
    assert all(0 < check.error < check.bound for check in checks)


@pytest.mark.parametrize("name", CASES)
def test_every_case_notices_another_input(name: str) -> None:
    tensors = CASES[name].tensors()
    expected = CASES[name].expected(tensors)
    shifted = CASES[name].expected(tensors | {"input": tensors["input"] * tensors["input"].abs()})
    for output, tensor in expected.items():
        if output != "grad_bias":
            assert float((shifted[output] - tensor).abs().max()) > 1e-3 * float(tensor.abs().max()), output


@pytest.mark.parametrize(
    ("error", "problem"), [(0.9e-5, ""), (1.1e-5, "FAILED"), (math.nan, "FAILED"), (math.inf, "FAILED")]
)
def test_an_error_over_its_bound_is_a_problem(error: float, problem: str) -> None:
    assert Check.run("case", "cpu", 1e-5, lambda: error).problem == problem


def test_a_call_that_fails_is_a_problem() -> None:
    checks = list(check_normalizations("nowhere"))
    assert all(check.problem.startswith("RuntimeError: ") for check in checks)


def test_the_command_passes_and_leaves_the_operators_settings_alone(tmp_path: Path) -> None:
    done = _service(
        "selftest",
        TMPDIR=str(tmp_path),
        NORMSERVE_DATA_DIR="/nowhere",
        NORMSERVE_DATABASE_URL="sqlite:////nowhere/x.db",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["check", "device", "error", "bound", "seconds", "result"]
    assert sum(line.endswith("  ok") for line in lines) == 2 * len(METHODS) + 3 == len(lines) - 2
    assert lines[-1].endswith("all passed")
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_cannot_start_fails_the_command() -> None:
    done = _service("selftest", NORMSERVE_DEVICE="tpu")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("1 FAILED: service starts")
    assert "NORMSERVE_DEVICE: expected auto, cpu or cuda:N" in done.stderr


def test_wrong_arguments_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["selftest", "again"], ["--port", "80"]):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err.splitlines()[0][:24]) == ("", "usage: python -m service")
    assert main(["--help"]) == 0
    assert "python -m service selftest" in capsys.readouterr().out
