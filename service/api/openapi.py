"""The OpenAPI document: the framework's, completed by the plain ASGI routes, whose part is written from the tables."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from normcore.normalization import Method, Parameter
from service.api import curl, failures, statistics_openapi
from service.api.illustrations import DESCRIPTION, Illustrations
from service.api.schemas import Problem
from service.application.methods import METHODS
from service.codecs.media import CODECS

_OWN = ("infer", "normalize_", "post_batch")
_BINARY = {"type": "string", "format": "binary"}
_KINDS = {
    "bool": ["boolean"],
    "int": ["integer"],
    "ints": ["string", "integer", "array"],
    "float": ["number"],
    "str": ["string"],
}
_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_JSON = "application/json"
_DEVICE = {"type": "string", "description": "auto, cpu or cuda:N; NORMSERVE_DEVICE where not given."}

# What a route's own code does not say of its parameters.
_DESCRIPTIONS = {
    "name": "Name of the model.",
    "version": "Version of the model, a whole number.",
    "method": "Name of the normalization method.",
    "statistics_id": "Id of the statistics.",
    "checkpoint_id": "Id of the checkpoint: the SHA-256 of its file.",
    "other_id": "Id of the checkpoint to compare it with.",
    "job_id": "Id of the job.",
    "bins": "Bins of equal width, from 1 to NORMSERVE_MAX_HISTOGRAM_BINS.",
    "channel": "Index of the channel; null: all together.",
}
# Of those that a route checks itself, or its path.
_LEAST = {"version": 1, "bins": 1, "channel": 0}


def install(app: FastAPI) -> None:
    """Make `app.openapi` answer the completed document."""
    framework = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = framework()
            schema["info"]["description"] = DESCRIPTION
            illustrations = Illustrations()
            schema["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
            for path, item in _tensor_paths().items():
                schema["paths"].setdefault(path, {}).update(item)
            for path, item in schema["paths"].items():
                for operation in item.values():
                    schema["components"]["schemas"].update(_nested_schemas(operation))
                    _simplify_parameters(operation)
                    _summarize(operation)
                    _describe_parameters(operation)
                    _describe_errors(operation, is_v2=path.startswith("/v2/"))
                    illustrations.add(operation)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the framework documents this way to extend its document


def operation_id(route: APIRoute) -> str:
    """The function's name, which generated clients take for their own; a route with two paths has two names."""
    return f"{route.name}_version" if "{version}" in route.path else route.name


def _tensor_paths() -> dict[str, Any]:
    paths: dict[str, Any] = {
        f"/v1/normalizations/{name}": {"post": _normalize(method)} for name, method in METHODS.items()
    }
    name = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
    }
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "integer"}}
    paths["/v2/models/{name}/infer"] = {"post": _infer("infer", [name])}
    paths["/v2/models/{name}/versions/{version}/infer"] = {"post": _infer("infer_version", [name, version])}
    paths[statistics_openapi.PATH] = {"post": statistics_openapi.operation()}
    return paths


def _normalize(method: Method) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": [tensor.name for tensor in method.tensors if tensor.is_required],
        "properties": {tensor.name: {"description": f"{tensor.role} {tensor.shape}"} for tensor in method.tensors}
        | {parameter.name: _parameter_schema(parameter) for parameter in method.parameters}
        | {
            "device": _DEVICE,
            "outputs": {
                "type": "array",
                "description": "Which outputs to compute; all that apply if omitted.",
                "items": {"type": "string", "enum": [output.name for output in method.outputs]},
            },
        },
    }
    answers: dict[str, Any] = {media: {"schema": _BINARY} for media in CODECS if media != _JSON}
    bodies = {media: answers[media] for media in curl.file_media_types(method)}
    return {
        "tags": ["normalizations"],
        "operationId": f"normalize_{method.name}",
        "summary": method.summary,
        "description": f"`{method.formula}`\n\nSource: {method.source}\n\nA tensor is nested lists (FP32) or "
        '`{"shape", "datatype", "data"}`. In the binary encodings the parameters travel in the query string:',
        "parameters": [
            {
                "name": parameter.name,
                "in": "query",
                "required": False,
                "description": f"{parameter.description} (binary encodings only)",
                "schema": _query_schema(parameter),
            }
            for parameter in method.parameters
        ]
        + [
            {
                "name": "device",
                "in": "query",
                "required": False,
                "description": _DEVICE["description"],
                "schema": _DEVICE,
            }
        ],
        "requestBody": {"required": True, "content": {_JSON: {"schema": schema}} | bodies},
        "responses": {
            "200": {
                "description": "Named outputs, and diagnostics where the data makes the result questionable.",
                "content": {_JSON: {"schema": {"type": "object"}}} | answers,
            }
        },
    }


def _parameter_schema(parameter: Parameter) -> dict[str, Any]:
    kinds = _KINDS[parameter.kind] + ["null"] * parameter.is_nullable
    schema: dict[str, Any] = {
        "type": kinds if len(kinds) > 1 else kinds[0],
        "description": parameter.description,
    }
    if parameter.kind == "ints":
        schema["items"] = {"type": "integer"}
    if parameter.default is not None:
        schema["default"] = parameter.default
    if parameter.choices:
        schema["enum"] = list(parameter.choices)
    if parameter.minimum is not None:
        schema["exclusiveMinimum" if parameter.exclusive_minimum else "minimum"] = parameter.minimum
    if parameter.maximum is not None:
        schema["maximum"] = parameter.maximum
    return schema


def _query_schema(parameter: Parameter) -> dict[str, Any]:
    """Without the default, which generated clients would send along with a JSON body."""
    return {key: value for key, value in _parameter_schema(parameter).items() if key != "default"}


def _infer(operation: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    binary = {"application/octet-stream": {"schema": _BINARY}}
    return {
        "tags": ["open inference protocol"],
        "operationId": operation,
        "summary": "Infer: tensors in, tensors out",
        "description": "The body is JSON, or JSON followed by raw tensors, with the length of the JSON in the header "
        "`Inference-Header-Content-Length`. The Content-Type is not looked at. `GET /v1/models/{name}` "
        "gives such a request for every model; here a binary one:",
        "parameters": [
            *parameters,
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "required": False,
                "description": "Bytes of JSON before the raw tensors; absent when the whole body is JSON.",
                "schema": {"type": "integer", "minimum": 0},
            },
        ],
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": {"type": "object"}}} | binary,
        },
        "responses": {
            "200": {
                "description": "Named outputs, as JSON or binary as the request asks.",
                "content": {_JSON: {"schema": {"type": "object"}}} | binary,
            }
        },
    }


def _nested_schemas(operation: dict[str, Any]) -> dict[str, Any]:
    """The schemas inside a request document that its route declares by hand; they belong among the components."""
    found: dict[str, Any] = {}
    for content in operation.get("requestBody", {}).get("content", {}).values():
        found |= content["schema"].pop("$defs", {})
    return found


def _simplify_parameters(operation: dict[str, Any]) -> None:
    """In a path nothing is null, and in the query string of a document's fields null is to leave the parameter out.

    A header that may come several times is one text to a client.
    """
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "header" and parameter["schema"].get("type") == "array":
            parameter["schema"] = {"type": "string"}
        kinds = [kind for kind in parameter["schema"].get("anyOf", ()) if kind != {"type": "null"}]
        if len(kinds) == 1:
            parameter["schema"] = kinds[0]


def _summarize(operation: dict[str, Any]) -> None:
    """The first line of a route's docstring says more than its function's name."""
    description = operation.setdefault("description", operation["summary"])
    if "operationId" in operation and not operation["operationId"].startswith(_OWN):
        operation["summary"] = description.partition("\n")[0].rstrip(".")


def _describe_parameters(operation: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in _DESCRIPTIONS:
            parameter.setdefault("description", _DESCRIPTIONS[parameter["name"]])
        if parameter["name"] in _LEAST:
            parameter["schema"].setdefault("minimum", _LEAST[parameter["name"]])


def _describe_errors(operation: dict[str, Any], *, is_v2: bool) -> None:
    """Every error answer has one form; the statuses come from the one table."""
    responses = operation["responses"]
    responses.pop("422", None)
    for status, named in failures.codes(operation, is_v2=is_v2).items():
        responses[str(status)] = _error(", ".join(f"`{code}`" for code in named))
    responses["default"] = _error("Any other error, such as 405 `method_not_allowed`, in the same form")


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": _PROBLEM}}}
