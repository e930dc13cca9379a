"""Trackers get every value of a run, continue their run after a resume, and never stop or delay it."""

from __future__ import annotations

import logging
import sys
import threading
import types

import pytest

from oreal_megatron import config as c
from oreal_megatron.config import Config, ConfigError, RecordConfig
from oreal_megatron.observe import trackers
from oreal_megatron.session import model_checks


class FakeWandb(types.ModuleType):
    """The calls of W&B that are used; `breaks`: the one that fails."""

    def __init__(self, breaks: str = ""):
        super().__init__("wandb")
        self.breaks, self.rows, self.starts, self.finished = breaks, [], [], False

    def init(self, **options):
        self._call("init")
        self.starts.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self._call("log")
        self.rows.append(row)

    def finish(self):
        self.finished = True

    def _call(self, name: str) -> None:
        if self.breaks == name:
            raise RuntimeError(f"{name} of the service")


class FakeMlflow(types.ModuleType):
    """The calls of MLflow that are used."""

    def __init__(self):
        super().__init__("mlflow")
        self.rows, self.starts, self.parameters, self.ended = [], [], {}, 0

    def start_run(self, **options):
        self.starts.append(options)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="id-of-the-run"))

    def log_params(self, parameters):
        self.parameters |= parameters

    def log_metrics(self, values, step):
        assert all(type(value) is float for value in values.values())
        self.rows.append((step, values))

    def end_run(self):
        self.ended += 1


def config_of(tmp_path, *names: str) -> Config:
    (tmp_path / "run").mkdir(exist_ok=True)
    return Config(run=str(tmp_path / "run"), record=RecordConfig(trackers=names))


def give(config: Config, first_step: int = 0, steps: int = 3) -> None:
    group = trackers.Trackers(config, first_step)
    for step in range(first_step, first_step + steps):
        group.add(step, {"loss/total": step / 2, "batch/samples": 4})
    group.close()
    group.close()


def test_wandb_gets_every_row_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = config_of(tmp_path, "wandb")
    give(config)
    give(config, first_step=2)
    assert [row["step"] for row in wandb.rows] == [0, 1, 2, 2, 3, 4] and wandb.rows[1]["loss/total"] == 0.5
    first, second = wandb.starts
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"]["seed"] == 0
    assert wandb.finished


def test_mlflow_gets_parameters_and_metrics_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    config = config_of(tmp_path, "mlflow")
    give(config)
    assert mlflow.starts == [{"run_name": "run"}] and mlflow.parameters["loss.kl_coef"] == "0.01"
    give(config, first_step=2)
    assert mlflow.starts[1] == {"run_id": "id-of-the-run"} and mlflow.ended == 2
    assert [step for step, _ in mlflow.rows] == [0, 1, 2, 2, 3, 4]
    give(config)  # a run that begins again is another one
    assert mlflow.starts[2] == {"run_name": "run"}


@pytest.mark.parametrize("breaks", ["import", "init", "log"])
def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(breaks, tmp_path, monkeypatch, caplog):
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(breaks) if breaks != "import" else None)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with caplog.at_level(logging.WARNING):
        give(config_of(tmp_path, "wandb", "mlflow"))
    assert len(mlflow.rows) == 3
    warnings = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    assert len(warnings) == 1 and warnings[0].startswith("wandb is left out from now on (")
    assert f"RuntimeError: {breaks} of the service" in warnings[0] or "ModuleNotFoundError: import" in warnings[0]


def test_a_tracker_that_hangs_delays_neither_the_run_nor_its_end(tmp_path, monkeypatch, caplog):
    wandb, released = FakeWandb(), threading.Event()
    monkeypatch.setattr(wandb, "log", lambda row: released.wait())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(trackers, "MOST_WAITING", 5)
    group = trackers.Trackers(config_of(tmp_path, "wandb"))
    with caplog.at_level(logging.WARNING):
        for step in range(20):  # returns although the service takes nothing
            group.add(step, {"a": 1.0})
        group.close(limit_s=0.01)
    released.set()
    warnings = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    assert warnings == ["wandb is left out from now on (it is 5 steps behind); metrics.jsonl has every value"]


def test_tensorboard_has_the_values(tmp_path):
    give(config_of(tmp_path, "tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(model_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="record.trackers names mlflow, which is not installed here"):
        model_checks.check_trackers(c.Config(record=RecordConfig(trackers=("mlflow",))))
