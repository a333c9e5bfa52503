"""What surrounds every request: an id, one log line, a fixed 500, and the guard against foreign web pages."""

import logging
import random
import re
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.asgi import header
from service.api.errors import envelope, internal_error
from service.telemetry import request_id
from service.tracing import RequestSpan, Tracing

log = logging.getLogger("service.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """Takes or makes the request's id (`X-Request-Id`), logs one line, and turns a failure into the fixed 500.

    The line of a success is of the level debug: writing it would cost a small inference a tenth of its rate.
    """

    def __init__(self, app: ASGIApp, *, tracing: Tracing | None = None) -> None:
        self.app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self._tracing is None:
            await self._handle(scope, receive, send)
        else:
            with self._tracing.request(scope["method"], scope["path"], Headers(scope=scope)) as span:
                await self._handle(scope, receive, send, span)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, span: RequestSpan | None = None) -> None:
        identity = identity_of(header(scope, b"x-request-id"))
        token = request_id.set(identity)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", identity.encode())]
                if span is not None:
                    added.append((b"traceparent", span.traceparent.encode()))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:  # the one place that turns the unforeseen into a 500
            log.exception("unhandled error")
            if not status:
                await internal_error()(scope, receive, send_with_id)
        finally:
            if span is not None:
                span.end(route=_route(scope), status=status)
            level = logging.DEBUG if 200 <= status < 400 else logging.INFO
            if log.isEnabledFor(level):
                elapsed_ms = round((time.perf_counter() - started) * 1000, 3)
                extra = {"method": scope["method"], "path": scope["path"], "status": status, "ms": elapsed_ms}
                log.log(level, "request", extra=extra)
            request_id.reset(token)


def identity_of(offered: str) -> str:
    """The request's id: the offered one if it is fit to be logged, else a new one."""
    return offered if _REQUEST_ID.fullmatch(offered) else f"{random.getrandbits(64):016x}"


def _route(scope: Scope) -> str:
    """The route's pattern, of which there are few; the method alone where nothing matched."""
    path = getattr(scope.get("route"), "path", "")
    return f"{scope['method']} {path}".strip()


class Guard:
    """Refuses a foreign `Origin`, so that no web page drives a local service, and unknown hosts if restricted."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: tuple[str, ...], allowed_origins: tuple[str, ...]) -> None:
        self.app = app
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await envelope(403, "forbidden", problem)(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        origin = header(scope, b"origin").lower()
        if not origin and not self._hosts:
            return None
        host = header(scope, b"host").lower()
        # Probes ask by address, whatever name the service is published under.
        if self._hosts and "/v2/health/" not in scope["path"] and _hostname(host) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return f"Host: expected one of {known} (NORMSERVE_ALLOWED_HOSTS), received {host[:200]!r}"
        if origin and origin not in self._origins and _authority(origin) != host:
            known = "this service's own origin or one of NORMSERVE_ALLOWED_ORIGINS"
            return f"Origin: expected {known}, received {origin[:200]!r}"
        return None


def _authority(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
