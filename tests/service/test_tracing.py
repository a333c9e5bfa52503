"""Traces against a collector: what arrives, and whose child it is."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.service.conftest import http, running_app, small_settings

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """Keeps the spans it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/traces"
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
async def traced(collector: Collector, tmp_path: Path) -> list[httpx.Response]:
    """The answers of a service that has sent its spans."""
    answers = []
    async with running_app(small_settings(tmp_path, otlp_endpoint=collector.url)) as app, http(app) as client:
        traceparent = f"00-{TRACE}-{PARENT}-01"
        answers.append(await client.get("/v2/models/normcore.rms_norm", headers={"traceparent": traceparent}))
        answers.append(await client.get("/v2/models/nobody"))
    return answers


async def test_a_request_is_a_child_of_its_caller(collector: Collector, traced: list[httpx.Response]) -> None:
    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    assert [span.name for span in spans] == ["GET /v2/models/{name}"]
    assert spans[0].parent_span_id.hex() == PARENT
    assert traced[0].headers["traceparent"] == f"00-{TRACE}-{spans[0].span_id.hex()}-01"
    attributes = {entry.key: entry.value for entry in spans[0].attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["url.path"].string_value == "/v2/models/normcore.rms_norm"


async def test_a_request_without_context_starts_a_trace(collector: Collector, traced: list[httpx.Response]) -> None:
    _, trace, span_id, _ = traced[1].headers["traceparent"].split("-")
    (span,) = [span for span in collector.spans if span.span_id.hex() == span_id]
    assert span.trace_id.hex() == trace != TRACE
    assert not span.parent_span_id


async def test_nothing_is_traced_by_default(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        answer = await client.get("/v2", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert "traceparent" not in answer.headers
