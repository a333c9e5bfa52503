import logging

import pytest

from normcore.errors import ParameterError
from service.engine.devices import providers_for

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def _names(device: str, available: list[str], gpus: int) -> list[str]:
    return [name for name, _ in providers_for(device, available=available, gpus=gpus)]


def test_auto_takes_the_first_gpu_where_onnxruntime_can_use_it() -> None:
    assert _names("auto", [CUDA, CPU], 2) == [CUDA, CPU]
    assert _names("auto", [CUDA, CPU], 0) == [CPU]
    assert _names("cpu", [CUDA, CPU], 2) == [CPU]


def test_auto_says_so_when_a_gpu_stays_unused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _names("auto", [CPU], 1) == [CPU]
    assert "CPU" in caplog.text


def test_a_numbered_gpu_is_that_one() -> None:
    (name, options), *_ = providers_for("cuda:1", available=[CUDA, CPU], gpus=2)
    assert (name, options["device_id"]) == (CUDA, 1)


@pytest.mark.parametrize(
    ("device", "available", "gpus", "words"),
    [
        ("cuda:9", [CUDA, CPU], 2, "one of the 2 GPUs of this host, received cuda:9"),
        ("cuda:0", [CPU], 1, "built without CUDA"),
        ("gpu", [CUDA, CPU], 1, "expected auto, cpu or cuda:N, received 'gpu'"),
        ("cuda:", [CUDA, CPU], 1, "expected auto, cpu or cuda:N"),
        ("cuda:-1", [CUDA, CPU], 1, "expected auto, cpu or cuda:N"),
    ],
)
def test_devices_that_are_not_there_are_refused(device: str, available: list[str], gpus: int, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        providers_for(device, available=available, gpus=gpus)
