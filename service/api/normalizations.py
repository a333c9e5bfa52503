"""/v1/normalizations: what can be computed, and computing it on posted tensors."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.datastructures import Headers, QueryParams
from starlette.types import Receive, Scope, Send

from normcore.errors import ParameterError
from normcore.normalization import Method
from service.api.asgi import CancelledWhenClientLeaves, send_tensors, services_of
from service.api.body import Received
from service.api.compression import response_coding
from service.api.infer import check_json_size, run_codec
from service.application.methods import METHODS
from service.application.usage import Timing
from service.codecs import json_v1, media
from service.codecs.body import TensorBody
from service.engine.normalization import DEVICE
from service.engine.protocol import ParameterValue
from service.errors import MethodNotFoundError

router = APIRouter(prefix="/v1/normalizations", tags=["normalizations"])


@router.get("")
async def list_methods() -> dict[str, list[dict[str, Any]]]:
    """List the normalization methods, each with its tensors, parameters, outputs and formula."""
    return {"normalizations": [method.describe() for method in METHODS.values()]}


@router.get("/{method}")
async def describe_method(method: str) -> dict[str, Any]:
    """Describe one method from the same table that validates its calls."""
    return _method(method).describe()


async def normalize(scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/normalizations/{method}: tensors in any encoding, outputs in the encoding that Accept asks for."""
    services = services_of(scope)
    method = _method(scope["path_params"]["method"])
    entry = services.models.find(f"normcore.{method.name}")
    headers, query = Headers(scope=scope), dict(QueryParams(scope["query_string"]).items())
    reader = media.request_codec(headers.get("content-type"))
    writer = media.response_codec(headers.get("accept"), default=reader)
    names = [tensor.name for tensor in method.tensors]
    async with Received(receive, headers, services) as body:
        json_bytes = len(body) if reader is json_v1 else 0
        check_json_size(json_bytes, services)
        started = time.perf_counter_ns()
        request = await run_codec(
            services,
            lambda: reader.decode(body, tensor_names=names, query_parameters=query),
            size_bytes=json_bytes,
        )
        decoded = time.perf_counter_ns()
        outputs = media.select_outputs(writer, request.outputs)
        parameters = _parameters(method, request, is_text=reader is not json_v1)
        with CancelledWhenClientLeaves(scope):
            result = await services.inference.infer(entry, request.tensors, outputs=outputs, parameters=parameters)
        computed = time.perf_counter_ns()
        encoded = await run_codec(
            services,
            lambda: writer.encode(method.name, result.outputs, result.diagnostics),
            size_bytes=sum(tensor.nbytes for tensor in result.outputs.values()) if writer is json_v1 else 0,
        )
    timing = Timing(result.queue_ns, decoded - started, result.compute_ns, time.perf_counter_ns() - computed)
    entry.usage.succeeded(timing, result, request_bytes=len(body), response_bytes=encoded.size_bytes)
    await send_tensors(send, encoded, timing, coding=response_coding(headers))


def _method(name: str) -> Method:
    method = METHODS.get(name)
    if method is None:
        raise MethodNotFoundError(f"method: expected one of {', '.join(METHODS)}, received {name[:80]!r}")
    return method


def _parameters(method: Method, request: TensorBody, *, is_text: bool) -> dict[str, ParameterValue]:
    """Parameters of a query string are text and are read by the method's own table; those of a JSON body have types."""
    if not is_text:
        return request.parameters
    known = {parameter.name: parameter for parameter in method.parameters}
    parsed: dict[str, ParameterValue] = {}
    for name, text in request.parameters.items():
        if name == DEVICE:
            parsed[name] = text
        elif name not in known:
            raise ParameterError(name, expected=f"one of {', '.join(known)}", received="an unknown parameter")
        else:
            parsed[name] = known[name].parse(str(text))
    return parsed
