"""The service in this process, driven over HTTP semantics without a socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.types import ASGIApp, Receive, Scope, Send

from service.app import create_app
from service.settings import Settings
from tests.service.documented import check_documented
from tests.service.zygotes import shared_zygotes


@asynccontextmanager
async def running_app(settings: Settings) -> AsyncIterator[ASGIApp]:
    """The app inside its lifespan, ready."""
    app = create_app(settings)
    async with AsyncExitStack() as stack:
        with shared_zygotes():
            state = await stack.enter_async_context(app.router.lifespan_context(app))

        async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = dict(state or {})
            await app(scope, receive, send)

        async with http(asgi) as client:
            for _ in range(1000):
                if (await client.get("/v2/health/ready")).status_code == 200:
                    break
                await asyncio.sleep(0.01)
        yield asgi


def http(app: ASGIApp, *, root_path: str = "") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, root_path=root_path)
    hooks = {"response": [check_documented]}
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60, event_hooks=hooks)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ASGIApp]:
    """One service for all tests that change no setting; tests name what they create apart."""
    async with running_app(small_settings(tmp_path_factory.mktemp("service"))) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def client(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    async with http(app) as opened:
        yield opened


def small_settings(folder: Path, **changes: Any) -> Settings:
    """Settings with limits that a test reaches quickly."""
    values: dict[str, Any] = {
        "data_dir": folder / "data",
        "max_body_bytes": 1_000_000,
        "max_json_bytes": 100_000,
        "max_checkpoint_bytes": 20_000_000,
        "receive_budget_bytes": 2_000_000,
        "body_timeout_s": 0.2,
        "compile_s": 0,
        "sandbox_deadline_s": 20,
        "sandbox_memory_bytes": 2 * 1024**3,
        "max_tensor_bytes": 256 * 1024**2,
    }
    return Settings(**(values | changes))
