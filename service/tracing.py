"""Traces where a collector is named: one span a request, W3C trace context in and out.

OpenTelemetry is imported only then: it is an extra.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service.errors import StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


class Tracing:
    """Spans of requests, sent to an OTLP collector by a thread of the library. Make it with `open`."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("normserve")

    @classmethod
    def open(cls, endpoint: str) -> "Tracing":
        """Send to `endpoint`, such as http://collector:4318. Raises StartError without the extra `tracing`."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise StartError("NORMSERVE_OTLP_ENDPOINT", "needs an extra: pip install 'normserve[tracing]'") from error
        provider = TracerProvider(resource=Resource.create({"service.name": "normserve"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator["RequestSpan"]:
        """The span of one request, child of the caller's where `traceparent` names one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        attributes = {"http.request.method": method, "url.path": path}
        with self._tracer.start_as_current_span(
            method, context=propagator.extract(headers), kind=SpanKind.SERVER, attributes=attributes
        ) as span:
            carrier: dict[str, str] = {}
            propagator.inject(carrier)
            yield RequestSpan(span, carrier["traceparent"])

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class RequestSpan:
    """A span that runs; `traceparent` is the header that names it."""

    def __init__(self, span: "Span", traceparent: str) -> None:
        self._span = span
        self.traceparent = traceparent

    def end(self, *, route: str, status: int) -> None:
        """Name it after its route, and mark a server's fault."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(route)
        self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
