"""OpenTelemetry traces of HTTP requests, exported by OTLP over HTTP. Needs the packages of the extra `tracing`."""

from fastapi.telemetry import TelemetryConfig
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


class _WithoutQueryValues(SpanProcessor):
    """A query is the one part of a request in a span that may hold what its client would not have stored."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if "url.query" in (span.attributes or {}):
            span.set_attribute("url.query", "REDACTED")


def tracer_provider(otlp_endpoint: str) -> TracerProvider:
    """Exports spans to `/v1/traces` of `otlp_endpoint`; to be shut down in the end.

    The exporter reads the standard's own variables for the rest, such as OTEL_EXPORTER_OTLP_HEADERS.
    """
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "elastic-dit"}))
    provider.add_span_processor(_WithoutQueryValues())
    exporter = OTLPSpanExporter(endpoint=f"{otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def telemetry_config(provider: TracerProvider) -> TelemetryConfig:
    """One span for a request: its method, route, path and status. Bodies and headers are in none."""
    return {
        "tracer_provider": provider,
        "operation_spans": False,
        "metrics": False,  # Prometheus has them
        "logs": False,  # they would carry the messages of exceptions
    }
