"""OpenTelemetry spans of steps and phases on this rank (`record.opentelemetry`).

A failure never stops a run, and no step waits for a collector: spans wait in a bounded queue and are sent by a thread.
The provider belongs to the run; the global one is vLLM's. Standard variables choose collector, protocol, headers and
names: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME and the others.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oreal_megatron.config import Config
from oreal_megatron.runtime import distributed, heartbeat

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)
CLOSE_S = 10.0  # for the last spans, at the end of the process
EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


class PhaseSpans:
    """Spans of steps, and of phases within them. Does nothing unless `record.opentelemetry` is set."""

    def __init__(self, config: Config, exporter: SpanExporter | None = None):
        """Start the sending thread. `exporter`: receiver of the spans; None: that of the standard variables."""
        self.failed = False
        self.provider: TracerProvider | None = None
        self.open_spans: list[Span] = []  # from the outermost to the innermost
        if config.record.opentelemetry:
            try:
                self._start(Path(config.run).name, exporter or otlp_exporter())
            except Exception as error:  # a broken installation and wrong variables raise anything
                self._report(f"{type(error).__name__}: {error}")

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Make a span of the body, within the span that is open. An exception gives it the status ERROR."""
        span = self._begin(name)
        error_name = ""
        try:
            yield
        except Exception as error:  # its text may hold prompts and responses, so only its type is sent
            error_name = type(error).__name__
            raise
        finally:
            if span:
                self._end(span, error_name)

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Send the last spans, at most so long. A second call does nothing."""
        atexit.unregister(self.close)
        if self.provider:
            self.closing.set()
            self.closer.join(limit_s)
            if self.closer.is_alive():
                self._report(f"the last ones were not sent within {limit_s:g} s")
        self.provider = None

    def _start(self, run: str, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        names = {"service.name": "oreal", "oreal.run": run, "oreal.rank": distributed.rank()}
        resource = Resource.create(names).merge(OTELResourceDetector().detect())  # the user's variables come first
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # its own shutdown may take 30 s
        provider.add_span_processor(BatchSpanProcessor(ReportingExporter(exporter, self._report)))
        self.tracer = provider.get_tracer("oreal_megatron")
        self.closing = threading.Event()
        # Started now, because Python 3.12 refuses new threads while a process ends.
        self.closer = threading.Thread(target=self._shut_down, args=(provider,), name="spans-closer", daemon=True)
        self.closer.start()
        self.provider = provider
        atexit.register(self.close)

    def _shut_down(self, provider: TracerProvider) -> None:
        self.closing.wait()
        provider.shutdown()

    def _begin(self, name: str) -> Span | None:
        if self.provider is None:
            return None
        try:
            from opentelemetry.context import Context
            from opentelemetry.trace import set_span_in_context

            # Parents are named: the current span of the process, which vLLM's spans would join, stays as it is.
            parent = set_span_in_context(self.open_spans[-1], Context()) if self.open_spans else Context()
            step = heartbeat.progress.step
            span = self.tracer.start_span(name, parent, attributes={} if step is None else {"oreal.step": step})
        except Exception as error:  # samplers are chosen by the user's variables
            self._report(f"{type(error).__name__}: {error}")
            return None
        self.open_spans.append(span)
        return span

    def _end(self, span: Span, error_name: str) -> None:
        self.open_spans.remove(span)
        try:
            from opentelemetry.trace import Status, StatusCode

            if error_name:
                span.set_status(Status(StatusCode.ERROR, error_name))
            span.end()
        except Exception as error:
            self._report(f"{type(error).__name__}: {error}")

    def _report(self, reason: str) -> None:
        """Log the first failure."""
        if not self.failed:
            log.warning(
                "OpenTelemetry spans are lost (%s); the run continues, and metrics.jsonl has the seconds of every "
                "phase. Check the OTEL_EXPORTER_OTLP_* variables, or set record.opentelemetry=false",
                reason,
            )
        self.failed = True


class ReportingExporter:
    """Span exporter that reports failures, which the library only logs."""

    def __init__(self, exporter: SpanExporter, report: Callable[[str], None]):
        self.exporter, self.report = exporter, report

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch, in the thread of the batch processor."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            result = self.exporter.export(spans)
        except Exception as error:  # exporters raise anything
            self.report(f"{type(error).__name__}: {error}")
            return SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            self.report("the collector cannot be reached, or refused them")
        return result

    def shutdown(self) -> None:
        """Close the connection."""
        self.exporter.shutdown()


def otlp_exporter() -> SpanExporter:
    """Return the OTLP exporter of the protocol that the standard variables name. Raises ValueError for another one."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next(filter(None, map(os.environ.get, names)), "http/protobuf")
    if protocol not in EXPORTERS:
        raise ValueError(f"{names[1]} is {protocol}; expected {' or '.join(EXPORTERS)}")
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)  # one line at each attempt; see _report
    exporter: SpanExporter = importlib.import_module(EXPORTERS[protocol]).OTLPSpanExporter()
    return exporter
