"""What handlers ask for: the services of the running app, and small JSON documents."""

import asyncio
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from service.api.body import received_small
from service.api.errors import InvalidDocumentError
from service.codecs.json_text import describe
from service.errors import PayloadMalformedError
from service.state import Services

_INLINE_JSON_BYTES = 64 * 1024


def get_services(request: Request) -> Services:
    services: Services = request.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]

Document = TypeVar("Document", bound=BaseModel)


async def read_document(request: Request, kind: type[Document]) -> Document:
    """A small JSON body as `kind`; an empty body is an empty object. Read under the same bounds as every body."""
    try:
        return kind.model_validate(await _read_json(request))
    except ValidationError as error:
        raise InvalidDocumentError(error.errors(include_url=False, include_context=False)) from error


async def read_object(request: Request, *, limit_bytes: int | None = None) -> dict[str, Any]:
    """A JSON object, a small one unless a limit is given; an empty body is an empty object, as clients send it."""
    content = await _read_json(request, limit_bytes=limit_bytes)
    if not isinstance(content, dict):
        raise PayloadMalformedError(f"body: expected a JSON object, received {describe(content)}")
    return content


def document_schema(kind: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """The OpenAPI request body of a route that uses `read_document`."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": is_required, "content": {"application/json": {"schema": schema}}}}


async def _read_json(request: Request, *, limit_bytes: int | None = None) -> Any:
    services = get_services(request)
    body = await received_small(request.receive, request.headers, services, limit_bytes=limit_bytes)
    try:
        if len(body) > _INLINE_JSON_BYTES:
            return await asyncio.get_running_loop().run_in_executor(services.json_thread, orjson.loads, body)
        return orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise PayloadMalformedError(f"body: expected a JSON object, received text that is not JSON: {error}") from error
