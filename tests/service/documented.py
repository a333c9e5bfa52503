"""Every error that a test meets must be in the OpenAPI document, at its operation."""

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import orjson

from service.app import create_app
from service.settings import Settings

# Of no operation: the path or its method is not there.
_ELSEWHERE = {"not_found", "method_not_allowed"}


async def check_documented(response: httpx.Response) -> None:
    """A hook for clients."""
    if response.status_code < 400:
        return
    operation = _operation(response.request.method, response.request.url.path)
    answer = orjson.loads(await response.aread()) if operation else {}
    if operation is None or answer.get("code") in _ELSEWHERE:
        return
    where = (operation["operationId"], response.status_code, answer)
    documented = operation["responses"].get(str(response.status_code))
    assert documented, where
    assert "code" not in answer or f"`{answer['code']}`" in documented["description"], where


def _operation(method: str, path: str) -> dict[str, Any] | None:
    matching = (operation for way, pattern, operation in _operations() if way == method and pattern.fullmatch(path))
    return next(matching, None)


@cache
def _operations() -> list[tuple[str, re.Pattern[str], dict[str, Any]]]:
    """Paths without parameters first."""
    paths = create_app(Settings(data_dir=Path(tempfile.gettempdir()) / "unused")).openapi()["paths"]
    return [
        (method.upper(), re.compile(re.sub(r"{\w+}", "[^/]+", path)), operation)
        for path, item in sorted(paths.items(), key=lambda entry: entry[0].count("{"))
        for method, operation in item.items()
    ]
