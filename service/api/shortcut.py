"""A shortcut for small inferences of brief models: their connections answer them in the turn of the loop they came in.

The task, the layers and the messages that carry a request to its route and back cost several times what a tiny model
computes. Only success is answered here: whatever is wrong, unusual or slow goes to the route, which knows all of it.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from starlette.types import Scope

from normcore.errors import NormcoreError
from service.api.asgi import headers_of, tensor_headers
from service.api.compression import response_coding
from service.api.infer import find_called_entry
from service.api.middleware import identity_of, log
from service.application.inference import check_inputs, check_outputs
from service.application.models import Entry
from service.application.usage import Timing
from service.codecs import oip
from service.engine.protocol import InferResult
from service.errors import ServiceError
from service.state import Services

_LARGEST_BODY_BYTES = 16 * 1024
_UNUSUAL_HEADERS = frozenset(("content-encoding", "expect", "origin"))


class Exchange(Protocol):
    """A request that came whole, and the way back to its client."""

    @property
    def scope(self) -> Scope: ...

    @property
    def body(self) -> bytearray: ...

    @property
    def can_answer(self) -> bool:
        """Whether the client is there and takes what is written."""
        ...

    def pass_on(self) -> None:
        """Leave it to the app."""
        ...

    def answer(self, headers: Sequence[tuple[bytes, bytes]], chunks: Sequence[bytes | memoryview]) -> None:
        """Status 200, all at once."""
        ...


class Shortcut:
    """Collects what one turn of the loop brings, runs it together, and passes on what it cannot answer."""

    def __init__(self, services: Services) -> None:
        settings = services.settings
        self._services = services
        self._largest_bytes = min(_LARGEST_BODY_BYTES, settings.max_body_bytes, settings.max_json_bytes)
        self._is_open = not settings.allowed_hosts and settings.otlp_endpoint is None
        self._offered: list[Exchange] = []

    def takes(self, scope: Scope) -> bool:
        """Whether a request with this head may be offered."""
        is_infer = scope["method"] == "POST" and scope["path"].endswith("/infer")
        return self._is_open and is_infer and not log.isEnabledFor(logging.DEBUG)

    def offer(self, exchange: Exchange) -> None:
        """Answer it at the end of this turn, or pass it on."""
        if not self._offered:
            asyncio.get_running_loop().call_soon(self._answer_offered)
        self._offered.append(exchange)

    def _answer_offered(self) -> None:
        offered, self._offered = self._offered, []
        answered: set[Exchange] = set()
        try:
            by_entry: dict[int, list[_Call]] = {}
            for exchange in offered:
                call = self._read(exchange)
                if call is not None:
                    by_entry.setdefault(id(call.entry), []).append(call)
            for calls in by_entry.values():
                requests = [(call.request.inputs, call.names) for call in calls]
                results = self._services.inference.infer_now(calls[0].entry, requests)
                for call, result in zip(calls, results, strict=True):
                    if result is not None:
                        _answer(call, result)
                        answered.add(call.exchange)
        finally:
            for exchange in offered:
                if exchange not in answered:
                    exchange.pass_on()

    def _read(self, exchange: Exchange) -> "_Call | None":
        """The request, decoded and checked; None where the route has to see it."""
        budget, size_bytes = self._services.budget, len(exchange.body)
        headers = headers_of(exchange.scope)
        if (
            not exchange.can_answer
            or size_bytes > self._largest_bytes
            or budget.used_bytes + size_bytes > budget.limit_bytes
            or not headers.keys().isdisjoint(_UNUSUAL_HEADERS)
            or response_coding(headers) is not None
        ):
            return None
        try:
            entry = find_called_entry(self._services.models, exchange.scope)
            if entry is None:
                return None
            spec = entry.engine().spec
            started_ns = time.perf_counter_ns()
            request = oip.decode_request(exchange.body, headers.get("inference-header-content-length"))
            names = [output.name for output in request.outputs] or None
            are_binary = all(output.is_binary for output in request.outputs) if names else request.wants_binary
            if request.raw is not None or request.parameters or not are_binary:
                return None
            decode_ns = time.perf_counter_ns() - started_ns
            check_inputs(spec, request.inputs)
            check_outputs(spec, names)
        except (NormcoreError, ServiceError):
            return None
        return _Call(exchange, entry, request, names, headers.get("x-request-id", ""), size_bytes, decode_ns)


class _Call(NamedTuple):
    exchange: Exchange
    entry: Entry
    request: oip.InferRequest
    names: Sequence[str] | None
    offered_identity: str
    size_bytes: int
    decode_ns: int


def _answer(call: _Call, result: InferResult) -> None:
    started_ns = time.perf_counter_ns()
    entry, request = call.entry, call.request
    encoded = oip.encode_response(
        entry.name,
        str(entry.version),
        result.outputs,
        id=request.id,
        requested=request.outputs,
        wants_binary=request.wants_binary,
    )
    timing = Timing(result.queue_ns, call.decode_ns, result.compute_ns, time.perf_counter_ns() - started_ns)
    identity = identity_of(call.offered_identity).encode()
    call.exchange.answer([*tensor_headers(encoded, timing), (b"x-request-id", identity)], encoded.chunks)
    entry.usage.succeeded(timing, result, request_bytes=call.size_bytes, response_bytes=encoded.size_bytes)
