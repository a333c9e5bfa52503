import logging

import pytest
import torch

from normcore.errors import ParameterError
from service.engine.devices import providers_for, torch_device

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
        ("cuda:0", [CUDA, CPU], 0, "torch finds no GPU on this host"),
        ("cuda:0", [CPU], 1, "built without CUDA"),
        ("gpu", [CUDA, CPU], 1, "expected auto, cpu or cuda:N, received 'gpu'"),
        ("cuda:", [CUDA, CPU], 1, "expected auto, cpu or cuda:N"),
        ("cuda:-1", [CUDA, CPU], 1, "expected auto, cpu or cuda:N"),
    ],
)
def test_devices_that_are_not_there_are_refused(device: str, available: list[str], gpus: int, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        providers_for(device, available=available, gpus=gpus)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda:0", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_torch_computes_where_the_name_says(device: str, gpus: int, expected: str) -> None:
    assert torch_device(device, gpus=gpus) == torch.device(expected)


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("cuda:9", 2, "expected one of the 2 GPUs of this host, received cuda:9"),
        ("cuda:0", 0, "expected auto or cpu: torch finds no GPU on this host, received cuda:0"),
        ("cuda", 1, "expected auto, cpu or cuda:N, received 'cuda'"),
        ("cuda:0 ", 1, "expected auto, cpu or cuda:N"),
        ("meta", 1, "expected auto, cpu or cuda:N"),
    ],
)
def test_torch_devices_that_are_not_there_are_refused(device: str, gpus: int, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        torch_device(device, gpus=gpus)
