"""Runs of onnxruntime on a GPU, with I/O binding."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch.utils.dlpack import from_dlpack

_CUDA = "CUDAExecutionProvider"


def cuda_device(providers: Sequence[str], provider_options: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The number of the GPU that a session prefers; None where it prefers the CPU."""
    if not providers or providers[0] != _CUDA:
        return None
    return int(provider_options[_CUDA].get("device_id", 0))


def run_bound(
    session: onnxruntime.InferenceSession,
    feeds: Mapping[str, Any],
    output_names: Sequence[str] | None,
    options: onnxruntime.RunOptions,
    *,
    device: tuple[str, int],
) -> list[NDArray[Any]]:
    """A run with I/O binding: each input is copied to the device once, the outputs come back at its end.

    Args:
        session: from `open_session`.
        feeds: arrays without strings, or values of onnxruntime, by input name.
        output_names: None for every output of the graph.
        options: of this run.
        device: kind and number, as onnxruntime names them.
    """
    binding = session.io_binding()
    for name, feed in feeds.items():
        value = feed
        if not isinstance(feed, onnxruntime.OrtValue):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(feed, order="C"), *device)
        binding.bind_ortvalue_input(name, value)
    for name in [node.name for node in session.get_outputs()] if output_names is None else output_names:
        binding.bind_output(name)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding, options)
    binding.synchronize_outputs()
    return [to_numpy(value) for value in binding.get_outputs()]


def to_numpy(value: onnxruntime.OrtValue) -> NDArray[Any]:
    """A value on the host as an array, which may be a view of memory that onnxruntime owns."""
    if value.element_type() != TensorProto.BFLOAT16:
        return np.asarray(value.numpy())
    bits: NDArray[Any] = from_dlpack(value).view(torch.int16).numpy()  # numpy has no bfloat16 of its own
    return bits.view(ml_dtypes.bfloat16)
