"""OpenTelemetry: a span for each request, named as the semantic conventions for generative AI say, and without text.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.runtime.service.told import RequestRecord

INSTALL = "pip install 'qwen-onnx[otel]'"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/audio/transcriptions": "transcription",
}


class Tracer:
    """Makes spans.

    Args:
        provider: an OpenTelemetry ``TracerProvider``.
    """

    def __init__(self, provider: Any, model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._model = provider, model
        self._tracer = provider.get_tracer("qwen_onnx")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, headers: Mapping[str, str], route: str, method: str) -> Any:
        """A span that continues the trace of the client's ``traceparent``."""
        from opentelemetry.trace import SpanKind

        operation = OPERATIONS.get(route)
        name = f"{operation} {self._model}" if operation else f"{method} {route}"
        span = self._tracer.start_span(name, context=self._propagator.extract(dict(headers)), kind=SpanKind.SERVER)
        if operation:
            span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "qwen_onnx",
                    "gen_ai.request.model": self._model,
                }
            )
        return span

    def end(self, span: Any, record: RequestRecord) -> None:
        """Close a span with what the request came to."""
        told = record.summary()
        attributes = {
            "http.request.method": record.method,
            "http.route": record.route,
            "http.response.status_code": record.status,
            "gen_ai.usage.input_tokens": told.get("prompt_tokens"),
            "gen_ai.usage.output_tokens": told.get("completion_tokens"),
            "gen_ai.usage.cache_read.input_tokens": told.get("cached_tokens"),
            "gen_ai.response.time_to_first_chunk": told.get("ttft"),
        }
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if record.generations:
            span.set_attribute("gen_ai.response.model", self._model)
            reasons = [one.finish_reason or "none" for one in record.generations]
            span.set_attribute("gen_ai.response.finish_reasons", reasons)
        fault = told.get("fault") or (str(record.status) if record.status >= 500 else None)
        if fault:
            from opentelemetry.trace import Status, StatusCode

            span.set_attribute("error.type", fault)
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def make_tracer(url: str, model: str) -> Tracer:
    """Spans go to a collector at ``url``, e.g. http://localhost:4318/v1/traces, in batches from a thread.

    Raises:
        EnvironmentFault: the extra ``otel`` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise EnvironmentFault("--otlp needs OpenTelemetry, which is not installed", hint=INSTALL) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "qwen-onnx"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return Tracer(provider, model)
