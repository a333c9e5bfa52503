"""One inference, the same for the protocol and for our own API: check against the spec, run, count."""

import asyncio
import time
from collections.abc import Sequence
from functools import lru_cache

from normcore.errors import DtypeError, ParameterError, ShapeError
from normcore.execution import ExecutionError
from service import datatypes
from service.application.methods import BATCH_NORM, STATISTICS_PARAMETERS, with_statistics
from service.application.models import Entry
from service.application.statistics import Statistics
from service.application.usage import FailureReason
from service.engine.protocol import InferResult, ModelSpec, Parameters, Tensor, Tensors, TensorSpec
from service.errors import DeadlineExceededError, OverloadedError

RESERVED_PARAMETERS = frozenset(
    (
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "priority",
        "timeout",
        "headers",
        "binary_data_output",
        "deterministic",
    )
)
_WHOLE_NUMBERS = ("priority", "sequence_id")
_FLAGS = ("sequence_start", "sequence_end")


class Inference:
    """Runs loaded models under a deadline."""

    def __init__(self, statistics: Statistics, *, deadline_s: float) -> None:
        self._statistics = statistics
        self._deadline_s = deadline_s

    async def infer(
        self, entry: Entry, inputs: Tensors, *, outputs: Sequence[str] | None = None, parameters: Parameters
    ) -> InferResult:
        """Compute `outputs` (None: all) of a ready model. A failure is counted and raised."""
        started = time.perf_counter_ns()
        try:
            engine = entry.engine()
            check_inputs(engine.spec, inputs)
            check_outputs(engine.spec, outputs)
            if parameters:
                _check_reserved(parameters)
            custom: Parameters = {key: value for key, value in parameters.items() if key not in RESERVED_PARAMETERS}
            if entry.name == BATCH_NORM and not STATISTICS_PARAMETERS.isdisjoint(custom):
                inputs, custom = await with_statistics(self._statistics, inputs, custom)
            return await engine.infer(
                inputs,
                outputs=outputs,
                parameters=custom,
                deadline_s=self._deadline(parameters.get("timeout")),
                is_alone=_flag(parameters, "deterministic"),
            )
        except BaseException as error:
            entry.usage.failed(time.perf_counter_ns() - started, _reason(error))
            raise

    def infer_now(
        self, entry: Entry, requests: Sequence[tuple[Tensors, Sequence[str] | None]]
    ) -> list[InferResult | None]:
        """The results of requests without parameters that are known to be brief, computed in the event loop.

        None for each that is left to `infer`, which counts and raises what fails. The inputs were checked.
        """
        return entry.engine().infer_now(requests, deadline_s=self._deadline_s)

    def _deadline(self, timeout_us: object) -> float:
        if timeout_us is None or timeout_us == 0:
            return self._deadline_s
        if isinstance(timeout_us, bool) or not isinstance(timeout_us, int) or timeout_us < 0:
            raise ParameterError("timeout", expected="microseconds as a whole number >= 0", received=_shown(timeout_us))
        return self._deadline_s if timeout_us >= self._deadline_s * 1e6 else timeout_us / 1e6


def _check_reserved(parameters: Parameters) -> None:
    """Requests are run in the order of their arrival and know no sequences: these are only checked."""
    for name in _WHOLE_NUMBERS:
        value = parameters.get(name, 0)
        is_text = name == "sequence_id" and isinstance(value, str)
        if not is_text and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ParameterError(name, expected="a whole number >= 0", received=_shown(value))
    for name in _FLAGS:
        _flag(parameters, name)


def _reason(error: BaseException) -> FailureReason:
    """Triton's reason for a failure."""
    if isinstance(error, asyncio.CancelledError):
        return "CANCELED"
    if isinstance(error, OverloadedError | DeadlineExceededError):
        return "REJECTED"
    return "BACKEND" if isinstance(error, ExecutionError) else "OTHER"


def _flag(parameters: Parameters, name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise ParameterError(name, expected="true or false", received=_shown(value))
    return value


def _shown(value: object) -> str:
    """For a message: a text may be as long as a body."""
    return repr(value[:60] if isinstance(value, str) else value)


def check_inputs(spec: ModelSpec, inputs: Tensors) -> None:
    """Names, datatypes and shapes against the spec. Raises ParameterError, DtypeError or ShapeError."""
    known = [tensor.name for tensor in spec.inputs]
    for name in inputs:
        if name not in known:
            raise ParameterError(
                name[:60], expected=f"one of the inputs {', '.join(known)}", received="an unknown input"
            )
    for tensor in spec.inputs:
        if tensor.name not in inputs:
            if not tensor.is_optional:
                expected = "a tensor" if spec.is_checked_by_engine else f"a tensor of {_wanted(tensor)}"
                raise ParameterError(tensor.name, expected=expected, received="no such input")
        elif not spec.is_checked_by_engine:
            _check_tensor(tensor, inputs[tensor.name])


def check_outputs(spec: ModelSpec, outputs: Sequence[str] | None) -> None:
    if outputs is None:
        return
    known = {tensor.name for tensor in spec.outputs}
    for name in outputs:
        if name not in known:
            expected = f"one of {', '.join(sorted(known))}"
            raise ParameterError("outputs", expected=expected, received=f"the unknown output {_shown(name)}")


def _check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    datatype = datatypes.of(tensor).name
    if datatype != spec.datatype:
        raise DtypeError(spec.name, expected=spec.datatype, received=datatype)
    if not _fits(spec.shape, tensor.shape):
        raise ShapeError(spec.name, expected=f"shape {list(spec.shape)}", received=f"shape {list(tensor.shape)}")


@lru_cache(maxsize=1024)  # requests repeat their shapes, and each is checked
def _fits(wanted: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(
        expected in (-1, size) for expected, size in zip(wanted, shape, strict=True)
    )


def _wanted(spec: TensorSpec) -> str:
    return f"datatype {spec.datatype} and shape {list(spec.shape)}"
