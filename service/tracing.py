"""OpenTelemetry traces of HTTP requests, exported by OTLP over HTTP. Needs the packages of the extra `tracing`."""

from fastapi.telemetry import TelemetryConfig
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


class _WithoutQueryValues(SpanProcessor):
    """Redacts queries: the only part of a request in a span that may hold secrets of the client."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if "url.query" in (span.attributes or {}):
            span.set_attribute("url.query", "REDACTED")


def tracer_provider(otlp_endpoint: str) -> TracerProvider:
    """A provider that exports spans to `/v1/traces` of `otlp_endpoint`. The caller shuts it down.

    The exporter also reads the standard's environment variables, such as OTEL_EXPORTER_OTLP_HEADERS.
    """
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "elastic-dit"}))
    provider.add_span_processor(_WithoutQueryValues())
    exporter = OTLPSpanExporter(endpoint=f"{otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def telemetry_config(provider: TracerProvider) -> TelemetryConfig:
    """One span for each request, with method, route, path and status, without bodies and headers."""
    return {
        "tracer_provider": provider,
        "operation_spans": False,
        "metrics": False,  # Prometheus has them
        "logs": False,  # they would contain the messages of exceptions
    }
