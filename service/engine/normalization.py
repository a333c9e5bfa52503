"""The normalization methods as built-in models: `normcore.<method>`."""

from collections.abc import Sequence

import torch

from normcore.errors import ParameterError
from normcore.normalization.method import JSON, Method
from service.engine.devices import torch_device
from service.engine.protocol import InferResult, ModelSpec, Parameters, ParameterValue, Tensor, Tensors, TensorSpec
from service.engine.tensors import from_torch, to_torch
from service.engine.worker import Worker
from service.errors import OverloadedError

PREFIX = "normcore."
DEVICE = "device"  # a parameter that every method has here, and none in the library

_CPU = torch.device("cpu")


class NormalizationEngine:
    """Implements Engine for one method. All methods share one worker: torch's threads serve one call at a time.

    Calls run on `device` unless their parameter `device` (auto, cpu or cuda:N) names another; never by their size.
    """

    def __init__(self, method: Method, worker: Worker, device: torch.device = _CPU) -> None:
        self._method = method
        self._device = device
        self._worker = worker
        self._in_flight = 0
        self._spec = ModelSpec(
            name=f"{PREFIX}{method.name}",
            version="1",
            platform="normcore",
            backend="normcore",
            inputs=tuple(
                TensorSpec(tensor.name, "FP32", (-1,), is_optional=not tensor.is_required) for tensor in method.tensors
            ),
            outputs=tuple(TensorSpec(output.name, "FP32", (-1,)) for output in method.outputs),
            is_checked_by_engine=True,
        )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def waiting(self) -> int:
        """See Engine; the calls of this method alone, the one that runs included."""
        return self._in_flight

    async def infer(
        self,
        inputs: Tensors,
        *,
        outputs: Sequence[str] | None = None,
        parameters: Parameters | None = None,
        deadline_s: float,
        is_alone: bool = True,
    ) -> InferResult:
        """See Engine. Torch cannot be interrupted: after the deadline the worker finishes in the background.

        Every call runs alone. A GPU without room for a call is an OverloadedError.
        """
        values = dict(parameters or {})
        device = _device(values.pop(DEVICE)) if DEVICE in values else self._device

        def compute() -> tuple[dict[str, Tensor], dict[str, JSON]]:
            with torch.inference_mode():
                tensors = {name: to_torch(array, argument=name).to(device) for name, array in inputs.items()}
                result = self._method(tensors, values, outputs)
                return {name: from_torch(tensor) for name, tensor in result.outputs.items()}, result.diagnostics

        self._in_flight += 1
        try:
            ran = await self._worker.submit(compute, deadline_s=deadline_s)
        except torch.OutOfMemoryError:
            message = f"{device}: not enough free memory for this call; try later, send less or ask for device cpu"
            raise OverloadedError(message) from None
        finally:
            self._in_flight -= 1
        computed, diagnostics = ran.result
        return InferResult(computed, diagnostics=diagnostics, queue_ns=ran.queue_ns, compute_ns=ran.compute_ns)

    def infer_now(
        self, requests: Sequence[tuple[Tensors, Sequence[str] | None]], *, deadline_s: float
    ) -> list[InferResult | None]:
        """See Engine. What a normalization takes is not known before."""
        del deadline_s
        return [None] * len(requests)

    async def drain(self) -> None:
        """See Engine."""
        await self._worker.drain()

    async def close(self) -> None:
        """See Engine. It closes the worker, and so all methods."""
        await self._worker.close()


def _device(value: ParameterValue) -> torch.device:
    if not isinstance(value, str):
        raise ParameterError(DEVICE, expected="auto, cpu or cuda:N", received=repr(value)[:40])
    return torch_device(value)
