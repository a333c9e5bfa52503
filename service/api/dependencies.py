"""What handlers ask for: the services of the running app, and small JSON documents."""

from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from service.api.body import received_small
from service.api.errors import InvalidDocumentError
from service.errors import PayloadMalformedError
from service.state import Services


def get_services(request: Request) -> Services:
    services: Services = request.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]

Document = TypeVar("Document", bound=BaseModel)


async def read_document(request: Request, kind: type[Document]) -> Document:
    """A small JSON body as `kind`; an empty body is an empty object. Read under the same bounds as every body."""
    body = await received_small(request.receive, request.headers, get_services(request))
    try:
        content: Any = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise PayloadMalformedError(f"body: expected a JSON object, received text that is not JSON: {error}") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidDocumentError(error.errors(include_url=False, include_context=False)) from error


def document_schema(kind: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """The OpenAPI request body of a route that uses `read_document`."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": is_required, "content": {"application/json": {"schema": schema}}}}
