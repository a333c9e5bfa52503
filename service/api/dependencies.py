"""What handlers ask for: the services of the running app, and small JSON documents."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from service.api.body import Received, received_small
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


async def read_object(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body is an empty object, as clients send it."""
    return _expect_object(await _read_json(request))


@asynccontextmanager
async def read_large_object(request: Request) -> AsyncIterator[dict[str, Any]]:
    """The same up to NORMSERVE_MAX_JSON_BYTES, within a context that counts them against the receive budget."""
    services = get_services(request)
    limit = services.settings.max_json_bytes
    receiving = Received(
        request.receive, request.headers, services, max_bytes=limit, setting="NORMSERVE_MAX_JSON_BYTES"
    )
    async with receiving as body:
        yield _expect_object(await _parsed(body, services))


def _expect_object(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise PayloadMalformedError(f"body: expected a JSON object, received {describe(content)}")
    return content


def document_schema(kind: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """The OpenAPI request body of a route that uses `read_document`."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": is_required, "content": {"application/json": {"schema": schema}}}}


async def _read_json(request: Request) -> Any:
    services = get_services(request)
    return await _parsed(await received_small(request.receive, request.headers, services), services)


async def _parsed(body: bytes | memoryview, services: Services) -> Any:
    try:
        if len(body) > _INLINE_JSON_BYTES:
            return await asyncio.get_running_loop().run_in_executor(services.json_thread, orjson.loads, body)
        return orjson.loads(body) if bytes(body).strip() else {}
    except orjson.JSONDecodeError as error:
        raise PayloadMalformedError(f"body: expected a JSON object, received text that is not JSON: {error}") from error
