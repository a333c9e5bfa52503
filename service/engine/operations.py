"""What a sandbox's child does with uploaded graphs: JSON in, JSON out. Runs in the child only (sandbox.py)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import ModelProto

from normcore.checkpoints.onnx import GraphLimits, inspect_onnx, load_onnx
from normcore.checkpoints.tensors import TensorLimits
from normcore.cost import is_cost_known
from normcore.errors import CheckpointError, DeadlineError, NormcoreError
from normcore.execution import ExecutionError, describe, open_session, run
from normcore.folding.checkpoint import Limits, Options, fold_file, plan_file
from normcore.folding.compare import compare_checkpoints
from normcore.folding.probes import Feeds, NoProbeError, Shapes, find_shapes
from normcore.folding.state_dict.options import Told
from normcore.folding.verify import ProbeOptions
from normcore.freezing import freeze_training_mode
from normcore.independence import RowCheck, check_rows
from normcore.recalibration.drift import measure_drift
from normcore.recalibration.recalibrate import recalibrate_checkpoint
from service.engine import staged_tensors
from service.engine.zygote import Operation, Report

Arguments = Mapping[str, Any]
Result = dict[str, Any]

_ALLOCATION_FAILURES = ("Failed to allocate memory", "bad_alloc", "bad allocation")


def inspect(arguments: Arguments, _: Report) -> Result:
    """`{path, limits, options}` -> `{format, summary, normalizations, notes}`."""
    return plan_file(Path(arguments["path"]), limits=_limits(arguments), options=_options(arguments))


def fold(arguments: Arguments, report: Report) -> Result:
    """`{source, target, limits, options, verify}` -> the fold's report; writes the file `target`."""
    verify = arguments["verify"]
    return fold_file(
        Path(arguments["source"]),
        Path(arguments["target"]),
        limits=_limits(arguments),
        options=_options(arguments),
        verify=None if verify is None else ProbeOptions(**verify),
        progress=report,
    )


def compare(arguments: Arguments, _: Report) -> Result:
    """`{original, other, limits, verify}` -> the certificate."""
    return compare_checkpoints(
        Path(arguments["original"]),
        Path(arguments["other"]),
        limits=_limits(arguments).graph,
        options=ProbeOptions(**arguments["verify"]),
    ).to_dict()


def freeze(arguments: Arguments, _: Report) -> Result:
    """`{source, target, limits}` -> `{frozen}`, the outputs of the nodes changed; writes the file `target`."""
    model = load_onnx(Path(arguments["source"]), limits=_limits(arguments).graph)
    frozen, changed = freeze_training_mode(model)
    Path(arguments["target"]).write_bytes(frozen.SerializeToString())
    return {"frozen": list(changed)}


def load(arguments: Arguments, _: Report) -> Result:
    """`{path, threads, deadline_s, optimization}` -> `{inputs, outputs, warm_up, shapes, rows}`: first runs.

    `warm_up` is None after a run on small inputs, which have the `shapes`, else why no such inputs were found. `rows`
    says whether the rows of a batch are computed independently of one another.
    """
    path = Path(arguments["path"])
    model = ModelProto.FromString(path.read_bytes())
    if inspect_onnx(model).has_training_mode:
        raise CheckpointError(
            "a batch norm or dropout of the graph computes in training mode, so its answers would depend on the other "
            "rows of a request, or on chance; export the model in inference mode (model.eval()), or serve it with "
            "freeze_training"
        )
    with _allocation_failures_as_memory_errors():
        session = open_session(path, threads=arguments["threads"], optimization=arguments["optimization"])
        known = asdict(describe(session)) | {"is_cost_known": is_cost_known(model)}
        try:
            shapes = _warm_up(model, session, deadline_s=arguments["deadline_s"])
        except NoProbeError as error:
            rows = RowCheck(False, None, f"it could not be tried: {error}")
            return known | {"warm_up": str(error), "shapes": None, "rows": asdict(rows)}
        rows = check_rows(model, session, shapes, seed=0, deadline_s=arguments["deadline_s"])
    return known | {"warm_up": None, "shapes": shapes, "rows": asdict(rows)}


def recalibrate(arguments: Arguments, report: Report) -> Result:
    """`{source, target, freeze_initializers} + calibration's` -> the report; writes the file `target`."""
    with _allocation_failures_as_memory_errors():
        return recalibrate_checkpoint(
            Path(arguments["source"]),
            Path(arguments["target"]),
            staged_tensors.read(Path(arguments["tensors"]), arguments["batches"]),
            limits=_limits(arguments).graph,
            freeze_initializers=arguments["freeze_initializers"],
            progress=report,
            **_calibration(arguments),
        ).to_dict()


def drift(arguments: Arguments, report: Report) -> Result:
    """`{source, threshold} + calibration's` -> the report."""
    with _allocation_failures_as_memory_errors():
        return measure_drift(
            load_onnx(Path(arguments["source"]), limits=_limits(arguments).graph),
            staged_tensors.read(Path(arguments["tensors"]), arguments["batches"]),
            threshold=arguments["threshold"],
            progress=report,
            **_calibration(arguments),
        ).to_dict()


OPERATIONS: Mapping[str, Operation] = {
    operation.__name__: operation for operation in (inspect, fold, compare, freeze, load, recalibrate, drift)
}


def _calibration(arguments: Arguments) -> dict[str, Any]:
    """`{tensors, batches, limits, threads, deadline_s}`: the first two are read by staged_tensors.py."""
    torch.set_num_threads(arguments["threads"])
    return {name: arguments[name] for name in ("threads", "deadline_s")}


def _limits(arguments: Arguments) -> Limits:
    limits = arguments["limits"]
    return Limits(graph=GraphLimits(**limits["graph"]), tensors=TensorLimits(**limits["tensors"]))


def _options(arguments: Arguments) -> Options:
    options = dict(arguments["options"])
    pairs = {norm: Told(**told) for norm, told in options.pop("pairs", {}).items()}
    return Options(**options, pairs=pairs)


def _warm_up(model: ModelProto, session: onnxruntime.InferenceSession, *, deadline_s: float) -> Shapes:
    """Shapes on which the graph runs. Raises NoProbeError."""

    def accept(feeds: Feeds) -> str | None:
        try:
            run(session, feeds, deadline_s=deadline_s)
        except DeadlineError:
            raise CheckpointError(f"a first run on small inputs did not end within {deadline_s:g} s") from None
        except ExecutionError as error:
            return _reason(error)
        return None

    return find_shapes(model, accept, seed=0)


def _reason(error: ExecutionError) -> str:
    """Why small inputs were refused, so that others are tried; no others are when memory ran out."""
    if _is_allocation_failure(error):
        raise error
    return str(error)


@contextmanager
def _allocation_failures_as_memory_errors() -> Iterator[None]:
    """Only the text of onnxruntime's errors tells that memory was what it lacked."""
    try:
        yield
    except NormcoreError as error:
        if _is_allocation_failure(error):
            raise MemoryError from error
        raise


def _is_allocation_failure(error: NormcoreError) -> bool:
    return any(text in str(error) for text in _ALLOCATION_FAILURES)
