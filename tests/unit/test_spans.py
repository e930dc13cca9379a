"""OpenTelemetry spans: one for each step and phase, apart from those of the process, never in the way of the run."""

from __future__ import annotations

import http.server
import logging
import threading
from collections.abc import Callable

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from oreal_megatron.config import Config, ConfigError, RecordConfig
from oreal_megatron.observe import spans
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.runtime import heartbeat
from oreal_megatron.session import model_checks

PHASES = ("generate", "verify", "policy")


class BrokenExporter(SpanExporter):
    """Exporter that fails as told: raises, refuses, or waits until it is released."""

    def __init__(self, kind: str):
        self.kind, self.released = kind, threading.Event()

    def export(self, spans):
        if self.kind == "raises":
            raise OSError("no route to the collector")
        if self.kind == "hangs":
            self.released.wait()
        return SpanExportResult.FAILURE

    def shutdown(self):
        pass


@pytest.fixture(autouse=True)
def own_variables(monkeypatch):
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_SAMPLER", "OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_PROTOCOL",
                 "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_EXPORTER_OTLP_ENDPOINT",
                 "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heartbeat, "progress", heartbeat.Progress())


def config_of(tmp_path, steps: int = 2, on: bool = True) -> Config:
    return Config(run=str(tmp_path / "run"), steps=steps, record=RecordConfig(trackers=(), opentelemetry=on))


@pytest.fixture
def recorder(monkeypatch) -> Callable[[Config, SpanExporter], Recorder]:
    """Make a recorder whose spans go to an exporter."""

    def make(config: Config, exporter: SpanExporter) -> Recorder:
        monkeypatch.setattr(spans, "otlp_exporter", lambda: exporter)
        return Recorder(config)

    return make


def take_steps(run: Recorder) -> None:
    """Take all steps, as loop.py does."""
    with run.steps() as steps:
        for _ in steps:
            for phase in PHASES:
                with run.phase(phase):
                    pass


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == spans.__name__]


def test_every_phase_is_a_span_within_that_of_its_step(recorder, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "name of the user")
    exporter = InMemorySpanExporter()
    run = recorder(config_of(tmp_path), exporter)
    take_steps(run)
    with run.phase("checkpoint"):  # after the last step
        pass
    run.spans.close()
    finished = exporter.get_finished_spans()
    assert [span.name for span in finished] == [*PHASES, "step"] * 2 + ["checkpoint"]
    steps = [span for span in finished if span.name == "step"]
    assert len({span.context.trace_id for span in steps}) == 2 and {span.parent for span in steps} == {None}
    assert finished[-1].parent is None
    for number, step in enumerate(steps):
        phases = finished[4 * number : 4 * number + 3]
        assert {span.parent.span_id for span in phases} == {step.context.span_id}
        assert {span.attributes["oreal.step"] for span in (*phases, step)} == {number}
        assert all(step.start_time <= span.start_time <= span.end_time <= step.end_time for span in phases)
    attributes = finished[0].resource.attributes
    assert attributes["oreal.run"] == "run" and attributes["oreal.rank"] == 0
    assert attributes["service.name"] == "name of the user"


def test_spans_of_the_process_stay_as_they_are(tmp_path):
    before, exporter = trace.get_tracer_provider(), InMemorySpanExporter()
    phases = spans.PhaseSpans(config_of(tmp_path), exporter)
    with phases.span("generate"):
        assert not trace.get_current_span().get_span_context().is_valid
    phases.close()
    assert trace.get_tracer_provider() is before and len(exporter.get_finished_spans()) == 1


def test_the_span_of_a_failed_phase_names_the_error_and_not_its_text_and_the_step_ends(recorder, tmp_path):
    exporter = InMemorySpanExporter()
    run = recorder(config_of(tmp_path), exporter)
    with pytest.raises(ValueError, match="text of a response"), run.steps() as steps:
        for _ in steps:
            with run.phase("generate"):
                raise ValueError("text of a response")
    assert run.spans.open_spans == []
    run.spans.close()
    phase, step = exporter.get_finished_spans()
    assert (phase.status.status_code, phase.status.description, step.name) == (StatusCode.ERROR, "ValueError", "step")
    assert "text of" not in phase.to_json()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raises", "(OSError: no route to the collector)"),
        ("refuses", "(the collector cannot be reached, or refused them)"),
        ("hangs", "(the last ones were not sent within 0.01 s)"),
    ],
)
def test_an_exporter_that_fails_neither_stops_nor_delays_a_run_and_is_reported_once(
    kind, reason, recorder, tmp_path, caplog
):
    exporter = BrokenExporter(kind)
    run = recorder(config_of(tmp_path), exporter)
    with caplog.at_level(logging.WARNING):
        take_steps(run)
        for _ in range(3000):  # more than the queue of the library takes
            with run.phase("policy"):
                pass
        run.spans.close(0.01 if kind == "hangs" else spans.CLOSE_S)
        exporter.released.set()
        run.spans.closer.join()
    messages = warnings_of(caplog)
    assert len(messages) == 1 and reason in messages[0] and "set record.opentelemetry=false" in messages[0]
    assert run.timer.seconds.keys() == set(PHASES)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier pigeon", "is carrier pigeon; expected http/protobuf or grpc"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "ValueError: max_queue_size must be a positive integer"),
    ],
)
def test_wrong_variables_are_reported_once_and_the_run_starts(variable, value, reason, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.WARNING):
        phases = spans.PhaseSpans(config_of(tmp_path))
        with phases.span("generate"):
            pass
        phases.close()
    assert len(warnings_of(caplog)) == 1 and reason in warnings_of(caplog)[0]


def test_a_collector_gets_them_over_http(tmp_path, monkeypatch):
    received = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        phases = spans.PhaseSpans(config_of(tmp_path))
        with phases.span("step"), phases.span("weight_sync"):
            pass
        phases.close(60)
        server.shutdown()
        thread.join()
    ((path, body),) = received
    assert path == "/v1/traces" and b"weight_sync" in body and b"oreal.rank" in body


@pytest.mark.parametrize("protocol", spans.EXPORTERS)
def test_the_standard_variables_choose_protocol_and_address(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.test:4000")
    exporter = spans.otlp_exporter()
    assert type(exporter).__module__ == spans.EXPORTERS[protocol]
    assert "collector.test:4000" in exporter._endpoint
    exporter.shutdown()


def test_nothing_of_it_happens_unless_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "otlp_exporter", lambda: pytest.fail("an exporter was made"))
    run = Recorder(config_of(tmp_path, on=False))
    with run.phase("policy"):
        assert run.spans.provider is None and run.spans.open_spans == []


def test_a_missing_package_is_refused_before_the_run(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(model_checks.importlib.util, "find_spec", missing)
    with pytest.raises(ConfigError, match="record.opentelemetry is true, and OpenTelemetry is not installed here"):
        model_checks.check_trackers(Config(record=RecordConfig(trackers=(), opentelemetry=True)))
