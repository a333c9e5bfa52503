import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch

from normcore.errors import DtypeError, ParameterError
from normcore.normalization import METHODS
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from service.engine.normalization import NormalizationEngine
from service.engine.protocol import Engine, TensorSpec
from service.engine.worker import Worker
from service.errors import DeadlineExceededError, ModelNotReadyError, OverloadedError


@dataclass
class Shifted:
    """Result of the fake method."""

    output: torch.Tensor
    mask: torch.Tensor | None

    def diagnostics(self) -> dict[str, JSON]:
        return {"shifted": [1, 2]}


def _shift(*, input: torch.Tensor, mask: torch.Tensor | None = None, by: float = 1.0) -> Shifted:
    return Shifted(input + by, mask)


def _method(function: Callable[..., Shifted]) -> Method:
    return Method(
        name="shift",
        summary="",
        formula="",
        source="",
        tensors=(TensorArgument("input", "input", "(*)", is_required=True), TensorArgument("mask", "mask", "(*)")),
        parameters=(Parameter("by", "float", 1.0, ""),),
        outputs=(Output("output", "(*)", ""), Output("mask", "(*)", "with a mask")),
        function=function,
    )


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker("normalization", queue_size=4)
    yield worker
    await worker.close()


async def test_spec_announces_fp32_and_leaves_the_checks_to_the_method(worker: Worker) -> None:
    spec = NormalizationEngine(_method(_shift), worker).spec

    assert (spec.name, spec.version, spec.platform) == ("normcore.shift", "1", "normcore")
    assert spec.inputs == (TensorSpec("input", "FP32", (-1,)), TensorSpec("mask", "FP32", (-1,), is_optional=True))
    assert spec.outputs == (TensorSpec("output", "FP32", (-1,)), TensorSpec("mask", "FP32", (-1,)))
    assert spec.is_checked_by_engine


async def test_infer_hands_over_tensors_parameters_outputs_and_diagnostics(worker: Worker) -> None:
    engine: Engine = NormalizationEngine(_method(_shift), worker)
    given = np.array([1.0, 2.0], dtype=ml_dtypes.bfloat16)

    result = await engine.infer({"input": given}, outputs=["output"], parameters={"by": 2}, deadline_s=10)

    assert list(result.outputs) == ["output"]
    assert result.outputs["output"].dtype == given.dtype
    assert result.outputs["output"].tolist() == [3.0, 4.0]
    assert result.diagnostics == {"shifted": [1, 2]}
    assert result.compute_ns > 0


async def test_inputs_are_not_copied_and_no_graph_is_recorded(worker: Worker) -> None:
    seen: list[tuple[int, bool]] = []

    def look(*, input: torch.Tensor) -> Shifted:
        seen.append((input.data_ptr(), torch.is_inference_mode_enabled()))
        return Shifted(input, None)

    given = np.ones(4, dtype=np.float32)
    await NormalizationEngine(_method(look), worker).infer({"input": given}, deadline_s=10)

    assert seen == [(given.ctypes.data, True)]


async def test_errors_of_the_method_reach_the_caller(worker: Worker) -> None:
    engine = NormalizationEngine(_method(_shift), worker)
    with pytest.raises(ParameterError, match="by: expected a finite number"):
        await engine.infer({"input": np.ones(1)}, parameters={"by": "far"}, deadline_s=10)
    with pytest.raises(DtypeError, match=r"^input: "):
        await engine.infer({"input": np.array([b"text"], dtype=object)}, deadline_s=10)


async def test_caller_is_answered_at_its_deadline_while_torch_goes_on(worker: Worker) -> None:
    opened, ended = threading.Event(), threading.Event()

    def wait(*, input: torch.Tensor) -> Shifted:
        opened.wait(10)
        ended.set()
        return Shifted(input, None)

    engine = NormalizationEngine(_method(wait), worker)
    with pytest.raises(DeadlineExceededError):
        await engine.infer({"input": np.ones(1)}, deadline_s=0.05)
    assert not ended.is_set()
    opened.set()
    await engine.infer({"input": np.ones(1)}, deadline_s=10)


async def test_closed_engine_refuses(worker: Worker) -> None:
    engine = NormalizationEngine(_method(_shift), worker)
    await engine.close()
    await engine.close()
    with pytest.raises(ModelNotReadyError):
        await engine.infer({"input": np.ones(1)}, deadline_s=10)


async def test_batch_norm_equals_the_method_called_directly(worker: Worker) -> None:
    method = METHODS["batch_norm"]
    tensors = {"input": torch.randn(5, 3, 4), "weight": torch.randn(3)}

    expected = method(tensors, {"training": True})
    result = await NormalizationEngine(method, worker).infer(
        {name: tensor.numpy() for name, tensor in tensors.items()}, parameters={"training": True}, deadline_s=10
    )

    assert list(result.outputs) == list(expected.outputs)
    for name, tensor in expected.outputs.items():
        np.testing.assert_array_equal(result.outputs[name], tensor.numpy())
    assert result.diagnostics == expected.diagnostics


async def test_integers_are_refused_by_the_method(worker: Worker) -> None:
    engine = NormalizationEngine(METHODS["batch_norm"], worker)
    with pytest.raises(DtypeError, match=r"^input: "):
        await engine.infer({"input": np.ones((2, 3), dtype=np.int32)}, deadline_s=10)


async def test_tensors_go_to_the_device_of_the_engine_or_of_the_call(worker: Worker) -> None:
    seen: list[torch.device] = []

    def look(*, input: torch.Tensor) -> Shifted:
        seen.append(input.device)
        return Shifted(torch.zeros(1), None)

    # "meta" stands for a device that is not the CPU: it has tensors without values, on every machine.
    engine = NormalizationEngine(_method(look), worker, torch.device("meta"))
    await engine.infer({"input": np.ones(3, np.float32)}, deadline_s=10)
    await engine.infer({"input": np.ones(3, np.float32)}, parameters={"device": "cpu"}, deadline_s=10)

    assert seen == [torch.device("meta"), torch.device("cpu")]


@pytest.mark.parametrize("device", ["cuda:99", "tpu", 3, None])
async def test_devices_that_are_not_there_are_refused(worker: Worker, device: str | int | None) -> None:
    engine = NormalizationEngine(_method(_shift), worker)
    with pytest.raises(ParameterError, match=r"^device: expected "):
        await engine.infer({"input": np.ones(1)}, parameters={"device": device}, deadline_s=10)


async def test_a_device_without_room_is_overloaded(worker: Worker) -> None:
    def fail(*, input: torch.Tensor) -> Shifted:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    with pytest.raises(OverloadedError, match="cpu: not enough free memory"):
        await NormalizationEngine(_method(fail), worker).infer({"input": np.ones(1)}, deadline_s=10)
