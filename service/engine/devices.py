"""Where work runs: what `auto`, `cpu` and `cuda:N` mean to onnxruntime and to torch."""

import logging
import re
from collections.abc import Sequence

import onnxruntime
import torch

from normcore.errors import ParameterError

log = logging.getLogger(__name__)

Providers = tuple[tuple[str, dict[str, object]], ...]

_CPU: tuple[str, dict[str, object]] = ("CPUExecutionProvider", {})
_CUDA = "CUDAExecutionProvider"


def providers_for(device: str, *, available: Sequence[str] | None = None, gpus: int | None = None) -> Providers:
    """The providers of a device, in the order of preference.

    `auto` is the first GPU where there is one that onnxruntime can use, else the CPU.

    Args:
        device: auto, cpu or cuda:N.
        available: onnxruntime's providers; None asks it.
        gpus: CUDA devices of this host; None asks torch.

    Raises:
        ParameterError: another word, or a GPU that is not there.
    """
    providers = onnxruntime.get_available_providers() if available is None else available
    count = torch.cuda.device_count() if gpus is None else gpus
    if device == "auto":
        if count and _CUDA not in providers:
            log.warning("a GPU is there, but this onnxruntime cannot use it: models run on the CPU")
        return _cuda(0) if count and _CUDA in providers else (_CPU,)
    number = _gpu_number(device)
    if number is None:
        return (_CPU,)
    if _CUDA not in providers:
        expected = "auto or cpu: this onnxruntime is built without CUDA"
        raise ParameterError("device", expected=expected, received=device)
    _check_gpu(number, count)
    return _cuda(number)


def torch_device(device: str, *, gpus: int | None = None) -> torch.device:
    """The device that torch computes on; `auto` is the first GPU where there is one, else the CPU.

    Args:
        device: auto, cpu or cuda:N.
        gpus: CUDA devices of this host; None asks torch.

    Raises:
        ParameterError: another word, or a GPU that is not there.
    """
    count = torch.cuda.device_count() if gpus is None else gpus
    number = (0 if count else None) if device == "auto" else _gpu_number(device)
    if number is None:
        return torch.device("cpu")
    _check_gpu(number, count)
    return torch.device("cuda", number)


def _gpu_number(device: str) -> int | None:
    """The N of cuda:N, None for cpu."""
    if device == "cpu":
        return None
    found = re.fullmatch(r"cuda:([0-9]{1,4})", device)
    if found is None:
        raise ParameterError("device", expected="auto, cpu or cuda:N", received=repr(device[:40]))
    return int(found[1])


def _check_gpu(number: int, count: int) -> None:
    if number >= count:
        expected = f"one of the {count} GPUs of this host" if count else "auto or cpu: torch finds no GPU on this host"
        raise ParameterError("device", expected=expected, received=f"cuda:{number}")


def _cuda(number: int) -> Providers:
    # HEURISTIC: the default tries every algorithm at the first run of every new shape, for seconds.
    return ((_CUDA, {"device_id": number, "cudnn_conv_algo_search": "HEURISTIC"}), _CPU)
