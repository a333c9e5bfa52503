"""Which errors an operation answers, by what it takes and does; the tests hold every refusal they see against this."""

from collections.abc import Iterator, Mapping
from typing import Any

import normcore.errors as numerical
import service.errors as own
from service.api.errors import TABLE

Errors = tuple[type[Exception], ...]

_ALWAYS: Errors = (own.ForbiddenError,)
_MISSING: Mapping[str, Errors] = {
    "name": (own.ModelNotFoundError,),
    "method": (own.MethodNotFoundError,),
    "checkpoint_id": (own.CheckpointNotFoundError,),
    "other_id": (own.CheckpointNotFoundError,),
    "statistics_id": (own.StatisticsNotFoundError,),
    "job_id": (own.JobNotFoundError,),
    "If-Match": (own.PreconditionError, own.PayloadMalformedError),
}
_BODY: Errors = (
    own.PayloadMalformedError,
    own.BodyTimeoutError,
    own.PayloadTooLargeError,
    own.MediaTypeError,
    own.OverloadedError,
)
_TENSORS: Errors = (
    numerical.ShapeError,
    numerical.DtypeError,
    numerical.StatisticsError,
    own.PayloadTooLargeError,
    own.OverloadedError,
)
_RUN: Errors = (*_TENSORS, own.UnsupportedError, own.DeadlineExceededError, own.ShuttingDownError)
_STORED: Errors = (own.StorageFullError,)
# In a child process with limits.
_GRAPH: Errors = (
    numerical.CheckpointError,
    numerical.NotSupportedError,
    own.OverloadedError,
    own.DeadlineExceededError,
    own.ShuttingDownError,
    own.StorageFullError,
)
_FOLD: Errors = (*_GRAPH, numerical.ParameterError, numerical.FoldError)
_CALIBRATE: Errors = (*_GRAPH, *_TENSORS)
_LOAD: Errors = (*_FOLD, own.ConflictError)

# By operation, or by the start of its name.
_DOES: Mapping[str, Errors] = {
    "normalize_": (*_RUN, own.NotAcceptableError, own.StatisticsNotFoundError),
    "infer": (*_RUN, own.StatisticsNotFoundError, own.ModelNotReadyError),
    "is_model_ready": (own.ModelNotReadyError,),
    "read_config": (own.ModelNotReadyError,),
    "read_model_metadata": (own.ModelNotReadyError,),
    "read_model_statistics": (own.ModelNotReadyError,),
    "create_statistics": (*_STORED, own.ConflictError),
    "post_batch": (*_TENSORS, *_STORED, own.ConflictError),
    "freeze_statistics": (*_STORED, *_BODY, numerical.ParameterError, own.ConflictError),
    "merge_statistics": (
        *_STORED,
        own.ConflictError,
        own.StatisticsNotFoundError,
        numerical.ParameterError,
        numerical.StatisticsError,
    ),
    "read_histogram": (numerical.StatisticsError, numerical.NotSupportedError),
    "upload_checkpoint": _GRAPH,
    "delete_checkpoint": (own.ConflictError,),
    "plan_fold": _FOLD,
    "fold_": _FOLD,
    "compare_checkpoints": _FOLD,
    "recalibrate_checkpoint": _CALIBRATE,
    "measure_drift": _CALIBRATE,
    "serve_model": (*_LOAD, own.CheckpointNotFoundError),
    "load_model": (*_LOAD, own.UnsupportedError),
    "unload_model": (own.ConflictError, own.UnsupportedError),
    "delete_model_version": (own.ConflictError, numerical.ParameterError),
}


def codes(operation: Mapping[str, Any], *, is_v2: bool) -> dict[int, list[str]]:
    """The codes of error answers by status; 500 is everywhere."""
    found: dict[int, set[str]] = {500: {"internal"}}
    for error in _errors(operation):
        row = TABLE[error]
        found.setdefault(row.v2_status if is_v2 and row.v2_status else row.status, set()).add(row.code)
    return {status: sorted(found[status]) for status in sorted(found)}


def _errors(operation: Mapping[str, Any]) -> Iterator[type[Exception]]:
    yield from _ALWAYS
    for parameter in operation.get("parameters", ()):
        yield from _MISSING.get(parameter["name"], ())
        if parameter["in"] != "path":
            yield numerical.ParameterError
    if "requestBody" in operation:
        yield from _BODY
        yield numerical.ParameterError
    for name, errors in _DOES.items():
        if operation["operationId"].startswith(name):
            yield from errors
