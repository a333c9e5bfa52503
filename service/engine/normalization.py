"""The normalization methods as built-in models: `normcore.<method>`."""

from collections.abc import Sequence

import torch

from normcore.normalization.method import JSON, Method
from service.engine.protocol import InferResult, ModelSpec, Parameters, Tensor, Tensors, TensorSpec
from service.engine.tensors import from_torch, to_torch
from service.engine.worker import Worker

PREFIX = "normcore."


class NormalizationEngine:
    """Implements Engine for one method. All methods share one worker: torch's threads serve one call at a time."""

    def __init__(self, method: Method, worker: Worker) -> None:
        self._method = method
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

        Every call runs alone.
        """

        def compute() -> tuple[dict[str, Tensor], dict[str, JSON]]:
            with torch.inference_mode():
                tensors = {name: to_torch(array, argument=name) for name, array in inputs.items()}
                result = self._method(tensors, parameters or {}, outputs)
                return {name: from_torch(tensor) for name, tensor in result.outputs.items()}, result.diagnostics

        self._in_flight += 1
        try:
            ran = await self._worker.submit(compute, deadline_s=deadline_s)
        finally:
            self._in_flight -= 1
        computed, diagnostics = ran.result
        return InferResult(computed, diagnostics=diagnostics, queue_ns=ran.queue_ns, compute_ns=ran.compute_ns)

    async def drain(self) -> None:
        """See Engine."""
        await self._worker.drain()

    async def close(self) -> None:
        """See Engine. It closes the worker, and so all methods."""
        await self._worker.close()
