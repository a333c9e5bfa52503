"""/v2 but for inference itself: health, metadata, configuration, statistics, repository."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service import __version__
from service.api.dependencies import ServicesDep, read_large_object, read_object
from service.api.infer import find_entry
from service.application.models import Entry
from service.codecs.json_text import describe, expect_object
from service.codecs.model_config import decode_overrides, encode_policy
from service.datatypes import by_name
from service.engine.protocol import TensorSpec
from service.errors import PayloadMalformedError, UnsupportedError
from service.state import Services


def _body(**properties: Any) -> dict[str, Any]:
    """The OpenAPI request body of a route whose body may also be empty."""
    schema = {"type": "object", "properties": properties}
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": schema}}}}


router = APIRouter(prefix="/v2", tags=["open inference protocol"])

_VERSIONED = {
    "parameters": [{"name": "version", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 1}}]
}

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")


@router.get("/health/live")
async def is_live() -> dict[str, bool]:
    """Whether the process answers."""
    return {"live": True}


@router.get("/health/ready", responses={503: {"description": "It does not: `error` says why."}})
async def is_ready(services: ServicesDep) -> JSONResponse:
    """Whether the service takes work: start-up loads were attempted and it does not drain."""
    ready = services.health.is_ready
    content = {"ready": ready, "live": True}
    if ready:
        return JSONResponse(content)
    reason = f"the service is {services.health.phase}"
    return JSONResponse(content | {"error": reason}, status_code=503, headers={"Retry-After": "1"})


@router.get("/", include_in_schema=False)
@router.get("")
async def read_server_metadata() -> dict[str, Any]:
    """Name, version and the protocol extensions that work here."""
    return {"name": "normserve", "version": __version__, "extensions": list(EXTENSIONS)}


@router.get("/models")
async def list_ready_models(services: ServicesDep) -> dict[str, list[str]]:
    """Names of the models that are ready."""
    return {"models": sorted({entry.name for entry in services.models.entries() if entry.loaded})}


@router.get("/models/stats")
async def read_all_statistics(services: ServicesDep) -> dict[str, Any]:
    """Counters of every ready model."""
    return _statistics(entry for entry in services.models.entries() if entry.loaded)


@router.get("/models/{name}/versions/{version}/stats", openapi_extra=_VERSIONED)
@router.get("/models/{name}/stats")
async def read_model_statistics(name: str, request: Request, services: ServicesDep) -> dict[str, Any]:
    """Counters of one model."""
    return _statistics([_ready(services, name, request)])


@router.get("/models/{name}/versions/{version}/ready", openapi_extra=_VERSIONED)
@router.get("/models/{name}/ready")
async def is_model_ready(name: str, request: Request, services: ServicesDep) -> dict[str, Any]:
    """Whether a model answers; 503 with the reason otherwise."""
    return {"name": _ready(services, name, request).name, "ready": True}


@router.get("/models/{name}/versions/{version}/config", openapi_extra=_VERSIONED)
@router.get("/models/{name}/config")
async def read_config(name: str, request: Request, services: ServicesDep) -> dict[str, Any]:
    """The model configuration, in the form that Triton's clients read."""
    entry = _ready(services, name, request)
    spec, options = entry.engine().spec, entry.options
    is_batched = options.max_batch_size > 0
    kind = "KIND_CPU" if options.device == "cpu" else "KIND_AUTO"
    config: dict[str, Any] = {
        "name": spec.name,
        "platform": spec.platform,
        "backend": spec.backend,
        "version_policy": encode_policy(options),
        "max_batch_size": options.max_batch_size,
        "input": [_config_input(tensor, is_batched=is_batched) for tensor in spec.inputs],
        "output": [_config_tensor(tensor, is_batched=is_batched) for tensor in spec.outputs],
        "instance_group": [{"name": spec.name, "kind": kind, "count": options.instances, "gpus": []}],
        "model_transaction_policy": {"decoupled": False},
        "parameters": {},
        "model_warmup": [],
    }
    if is_batched:
        config["dynamic_batching"] = {
            "preferred_batch_size": [],
            "max_queue_delay_microseconds": options.max_queue_delay_us,
        }
    return config


@router.get("/models/{name}/versions/{version}", openapi_extra=_VERSIONED)
@router.get("/models/{name}")
async def read_model_metadata(name: str, request: Request, services: ServicesDep) -> dict[str, Any]:
    """Versions, inputs and outputs of a model."""
    spec = _ready(services, name, request).engine().spec
    return {
        "name": spec.name,
        "versions": services.models.ready_versions(name),
        "platform": spec.platform,
        "inputs": [_metadata_tensor(tensor) for tensor in spec.inputs],
        "outputs": [_metadata_tensor(tensor) for tensor in spec.outputs],
    }


@router.post("/repository/index", openapi_extra=_body(ready={"type": "boolean"}))
async def index_repository(request: Request, services: ServicesDep) -> list[dict[str, str]]:
    """Every version of every model and its state; `{"ready": true}` asks for the ready ones only."""
    document = await read_object(request)
    wants_ready = document.get("ready", False)
    if not isinstance(wants_ready, bool):
        raise PayloadMalformedError(f"ready: expected true or false, received {describe(wants_ready)}")
    return [
        {"name": entry.name, "version": str(entry.version), "state": entry.state, "reason": entry.reason}
        for entry in services.models.entries()
        if entry.loaded or not wants_ready
    ]


@router.post("/repository/models/{name}/load", openapi_extra=_body(parameters={"type": "object"}))
async def load_model(name: str, request: Request, services: ServicesDep) -> Response:
    """Load every version of a registered model; a loaded one is swapped only when the new one is ready.

    `parameters.config`, a model configuration as a JSON text, changes `max_batch_size`, `dynamic_batching` and
    `instance_group`; with `file:<version>/model.onnx`, base64, these files become the versions of the model.
    """
    services.health.refuse_while_draining()
    async with read_large_object(request) as document:
        overrides = await asyncio.to_thread(decode_overrides, _parameters(document), model=name)
        if overrides is None:
            await services.models.load(name)
        elif overrides.files:
            kept = {version: await _keep(services, content) for version, content in overrides.files.items()}
            await services.models.load_files(name, kept, overrides.options)
        else:
            await services.models.load_changed(name, overrides.options)
    return Response(status_code=200)


@router.post("/repository/models/{name}/unload", openapi_extra=_body(parameters={"type": "object"}))
async def unload_model(name: str, request: Request, services: ServicesDep) -> Response:
    """Unload every version of a model, once the requests that it has accepted are answered; it stays registered.

    Of the parameters only `unload_dependents` is known; no model here has any, so that both values do the same.
    """
    document = await read_object(request)
    parameters = _parameters(document)
    for key, value in parameters.items():
        if key != "unload_dependents":
            raise UnsupportedError(f"parameters: expected unload_dependents, received {key[:80]!r}")
        if not isinstance(value, bool):
            raise PayloadMalformedError(f"parameters.{key}: expected true or false, received {describe(value)}")
    await services.models.unload(name)
    return Response(status_code=200)


@router.api_route("/models/{name}/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/logging", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/systemsharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/cudasharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
async def refuse_extension(request: Request) -> None:
    """Extensions of the protocol that this service does not have."""
    raise UnsupportedError(
        f"{request.url.path[:200]}: trace settings, log settings and shared memory are not supported"
    )


def _ready(services: Services, name: str, request: Request) -> Entry:
    entry = find_entry(services.models, name, request.path_params.get("version"))
    entry.engine()
    return entry


def _statistics(entries: Iterable[Entry]) -> dict[str, Any]:
    return {
        "model_stats": [
            {"name": entry.name, "version": str(entry.version)} | entry.usage.to_dict() for entry in entries
        ]
    }


def _metadata_tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _config_tensor(spec: TensorSpec, *, is_batched: bool) -> dict[str, Any]:
    """The batch axis is not among `dims`."""
    dims = list(spec.shape[1:] if is_batched else spec.shape)
    return {"name": spec.name, "data_type": by_name(spec.datatype).triton, "dims": dims}


def _config_input(spec: TensorSpec, *, is_batched: bool) -> dict[str, Any]:
    return _config_tensor(spec, is_batched=is_batched) | {
        "format": "FORMAT_NONE",
        "optional": spec.is_optional,
        "is_shape_tensor": False,
    }


def _parameters(document: dict[str, Any]) -> dict[str, object]:
    parameters = document.get("parameters")
    return {} if parameters is None else expect_object(parameters, field="parameters")


async def _keep(services: Services, content: bytes) -> str:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    record, _ = await services.checkpoints.keep(await services.checkpoints.stage(chunks()), filename="model.onnx")
    return record.id
