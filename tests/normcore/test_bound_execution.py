"""I/O binding: the same results as without, and only for sessions on a GPU. The CPU stands for the device."""

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from normcore import execution
from normcore.bound_execution import cuda_device, run_bound
from tests.normcore.test_execution import Shape, model

HOST = ("cpu", 0)


def _bound(
    session: onnxruntime.InferenceSession, feeds: dict[str, Any], names: list[str] | None = None
) -> list[NDArray[Any]]:
    return run_bound(session, feeds, names, onnxruntime.RunOptions(), device=HOST)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (1, 1)])
@pytest.mark.parametrize("names", [None, ["z"], ["z", "y"]], ids=["all", "one", "reordered"])
def test_outputs_are_those_of_a_plain_run(shape: tuple[int, int], names: list[str] | None) -> None:
    nodes = [helper.make_node("Add", ["a", "b"], ["y"]), helper.make_node("Mul", ["a", "b"], ["z"])]
    inputs: dict[str, tuple[int, Shape]] = dict.fromkeys("ab", (TensorProto.FLOAT, ("n", "m")))
    session = execution.open_session(model(nodes, inputs, {"y": TensorProto.FLOAT, "z": TensorProto.FLOAT}), threads=1)
    generator = np.random.default_rng(0)
    # one of them is not contiguous
    feeds = {"a": generator.random(shape, np.float32), "b": generator.random(shape[::-1], np.float32).T}
    for found, expected in zip(
        _bound(session, feeds, names), execution.run(session, feeds, names, deadline_s=10), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_bfloat16_goes_in_and_out() -> None:
    kind = TensorProto.BFLOAT16
    file = model([helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, ("n",))}, {"y": kind})
    session = execution.open_session(file, threads=1)
    bits = np.array([1.5, -2], ml_dtypes.bfloat16).view(np.uint16)
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
    (found,) = _bound(session, {"x": value})
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tolist() == [1.5, -2]


def test_a_session_on_a_gpu_is_known_by_its_first_provider() -> None:
    cuda = {"CUDAExecutionProvider": {"device_id": "1"}, "CPUExecutionProvider": {}}
    assert cuda_device(["CUDAExecutionProvider", "CPUExecutionProvider"], cuda) == 1
    assert cuda_device(["CPUExecutionProvider"], cuda) is None
    assert cuda_device(["CUDAExecutionProvider"], {"CUDAExecutionProvider": {}}) == 0
