"""The one status table, and the one envelope of every error answer.

`{"error": sentence, "code": slug, "request_id": id, "details": {...}}` is a superset of the Open Inference
Protocol's `{"error": sentence}`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import normcore.errors as numerical
import service.errors as own
from service.codecs.json_text import describe
from service.telemetry import request_id


class InvalidDocumentError(Exception):
    """A small JSON document that does not fit its schema; `problems` are pydantic's."""

    def __init__(self, problems: Sequence[Any]) -> None:
        super().__init__()
        self.problems = problems


class Row(NamedTuple):
    """The answer to one class of error; `v2_status` where the protocol's surface differs."""

    status: int
    code: str
    v2_status: int | None = None


TABLE: dict[type[Exception], Row] = {
    own.PayloadMalformedError: Row(400, "payload_malformed"),
    numerical.CheckpointError: Row(400, "checkpoint_invalid"),
    own.ForbiddenError: Row(403, "forbidden"),
    own.ModelNotFoundError: Row(404, "model_not_found"),
    own.CheckpointNotFoundError: Row(404, "checkpoint_not_found"),
    own.StatisticsNotFoundError: Row(404, "statistics_not_found"),
    own.MethodNotFoundError: Row(404, "method_not_found"),
    own.JobNotFoundError: Row(404, "job_not_found"),
    own.NotAcceptableError: Row(406, "not_acceptable"),
    own.BodyTimeoutError: Row(408, "body_timeout"),
    own.ConflictError: Row(409, "conflict"),
    own.PreconditionError: Row(412, "precondition_failed"),
    own.PayloadTooLargeError: Row(413, "payload_too_large"),
    own.MediaTypeError: Row(415, "media_type_unsupported"),
    numerical.ShapeError: Row(422, "shape_mismatch", v2_status=400),
    numerical.DtypeError: Row(422, "dtype_mismatch", v2_status=400),
    numerical.StatisticsError: Row(422, "statistics_invalid", v2_status=400),
    numerical.ParameterError: Row(422, "parameter_invalid", v2_status=400),
    numerical.NotSupportedError: Row(501, "not_implemented"),
    numerical.FoldError: Row(422, "fold_refused", v2_status=400),
    numerical.DeadlineError: Row(504, "deadline_exceeded"),
    numerical.NormcoreError: Row(422, "parameter_invalid", v2_status=400),
    own.OverloadedError: Row(429, "overloaded"),
    own.UnsupportedError: Row(501, "not_implemented"),
    own.ModelNotReadyError: Row(503, "model_not_ready"),
    own.ShuttingDownError: Row(503, "shutting_down"),
    own.DeadlineExceededError: Row(504, "deadline_exceeded"),
    own.StorageFullError: Row(507, "storage_full"),
}

_INTERNAL = (500, "internal", "internal error; the log has the trace under this request id")
Handler = Callable[[Request, Exception], Awaitable[Response]]

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


def install(app: FastAPI) -> None:
    """Register the table and the framework's own errors."""
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)


async def answer(scope: Scope, receive: Receive, send: Send, error: Exception) -> None:
    """Answer one of HANDLERS outside of the framework."""
    handler = next(HANDLERS[kind] for kind in type(error).__mro__ if kind in HANDLERS)
    response = await handler(Request(scope, receive), error)
    await response(scope, receive, send)


def envelope(
    status: int,
    code: str,
    message: str,
    *,
    details: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    content = {"error": message, "code": code, "request_id": request_id.get(), "details": details or {}}
    return JSONResponse(content, status_code=status, headers=headers)


def internal_error() -> Response:
    """The fixed text of a 500; the trace is in the log under the request id."""
    return envelope(*_INTERNAL)


def problem(error: Exception, *, request_id: str) -> dict[str, Any]:
    """The envelope of an error that ended a job, as the request that started the job would have been answered."""
    if not isinstance(error, numerical.NormcoreError | own.ServiceError):
        return {"error": _INTERNAL[2], "code": _INTERNAL[1], "request_id": request_id, "details": {}}
    return {"error": str(error), "code": _row(error).code, "request_id": request_id, "details": _details(error)}


async def _answer(request: Request, error: Exception) -> Response:
    row = _row(error)
    status = row.v2_status if _is_v2(request) and row.v2_status else row.status
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, own.OverloadedError) else {}
    if isinstance(error, own.ModelNotReadyError | own.ShuttingDownError):
        headers["Retry-After"] = "1"
    found = _details(error)
    if "accept_encoding" in found:
        headers["Accept-Encoding"] = found["accept_encoding"]
    return envelope(status, row.code, str(error), details=found, headers=headers)


def _row(error: Exception) -> Row:
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def _details(error: Exception) -> dict[str, Any]:
    if isinstance(error, numerical.ArgumentError):
        return {"argument": error.argument, "expected": error.expected, "received": error.received}
    return error.details if isinstance(error, own.ServiceError) else {}


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return envelope(error.status_code, code, message, headers=dict(error.headers or {}))


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answer_problems(request, error.errors())


async def _answer_document(request: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidDocumentError)
    return _answer_problems(request, error.problems)


def _answer_problems(request: Request, problems: Sequence[Any]) -> Response:
    """Names every argument at fault, with the start of what was sent."""
    row = TABLE[numerical.ParameterError]
    status = row.v2_status if _is_v2(request) and row.v2_status else row.status
    found = [
        f"{'.'.join(str(part) for part in problem['loc']) or 'body'}: {_sentence(problem)}" for problem in problems
    ]
    return envelope(status, row.code, "; ".join(found), details={"problems": found})


def _sentence(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "missing":
        return "expected a value, received none"
    if problem["type"] == "extra_forbidden":
        return "expected no field of this name"
    if problem["type"] == "model_type":
        return f"expected an object, received {describe(problem['input'])}"
    return f"{problem['msg']}, received {describe(problem['input'])}"


def _is_v2(request: Request) -> bool:
    path: str = request.scope["path"]  # a proxy may have taken the prefix away
    return path.removeprefix(request.scope.get("root_path", "")).startswith("/v2")


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


HANDLERS: dict[type[Exception], Handler] = dict.fromkeys(TABLE, _answer) | {
    HTTPException: _answer_http,
    RequestValidationError: _answer_validation,
    InvalidDocumentError: _answer_document,
    ClientDisconnect: _answer_nobody,
}
ANSWERED = tuple(HANDLERS)
