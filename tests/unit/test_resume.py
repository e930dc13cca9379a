"""Runs that are interrupted, resumed, taken back and changed: the real commands, folders and loop, with fake models."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import fake_run
import pytest

from oreal_megatron import config as c
from oreal_megatron import settings
from oreal_megatron.observe import run_folder
from oreal_megatron.runtime import checkpoint_folders, disk_space, files
from oreal_megatron.session import policy_weights
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.training.resume import Start

QUESTIONS = [{"question": f"{a}+{b}=", "gold_answer": str(a + b)} for a in range(3) for b in range(4)]


@pytest.fixture
def config(model_folder, tmp_path) -> c.Config:
    """Eight steps of four prompts: an epoch is three steps."""
    for name in ("problems", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    optimizer = c.OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)
    return c.Config(
        run=str(tmp_path / "run"),
        steps=8,
        policy_freeze_steps=1,
        model=c.ModelConfig(str(model_folder)),
        engine=c.EngineConfig(max_model_len=64),
        sampling=c.SamplingConfig(rollouts_per_prompt=4, max_new_tokens=8),
        data=c.DataConfig(str(tmp_path / "problems.jsonl"), str(tmp_path / "held_out.jsonl"), prompts_per_step=4),
        optimizer=optimizer,
        reward_model=c.RewardModelConfig(optimizer=optimizer),
        checkpoint=c.CheckpointConfig(every=2, keep=8),
        evaluation=c.EvaluationConfig(every=2, max_new_tokens=8),
    )


def changed(config: c.Config, *assignments: str) -> c.Config:
    return settings.override(config, list(assignments))


def elsewhere(config: c.Config, name: str) -> c.Config:
    return dataclasses.replace(config, run=str(Path(config.run).parent / name))


def contents(run: Path) -> dict[str, object]:
    """Return what a run leaves behind, without clock times."""

    def rows(name: str) -> list[dict]:
        lines = (run / name).read_text().splitlines()
        return [
            {key: value for key, value in json.loads(line).items() if "second" not in key and "speed/" not in key}
            for line in lines
        ]

    trees = [path for name in ("rollouts", "checkpoints", "policy", "best") for path in (run / name).rglob("*")]
    texts = {str(path.relative_to(run)): path.read_bytes() for path in sorted(trees) if path.is_file()}
    dumps = sorted(path.name for path in (run / "dumps").iterdir())
    return {"metrics": rows("metrics.jsonl"), "evaluations": rows("evaluations.jsonl"), "dumps": dumps} | texts


UNBROKEN: dict[str, dict[str, object]] = {}


def unbroken(config: c.Config) -> dict[str, object]:
    """Return what this run leaves behind when nothing interrupts it."""
    key = repr(dataclasses.replace(config, run="", data=dataclasses.replace(config.data, path="", held_out="")))
    if key not in UNBROKEN:
        alone = dataclasses.replace(config, run=f"{config.run}_unbroken_{len(UNBROKEN)}")
        assert fake_run.train(alone)
        UNBROKEN[key] = contents(Path(alone.run))
    return UNBROKEN[key]


@pytest.mark.parametrize(
    ("event", "keep"),
    [("save begins", 1), ("save is complete", 1), ("evaluated", 8), ("best is written", 8), ("policy is written", 1),
     ("step is done", 8)],
)  # fmt: skip
def test_a_run_killed_at_any_event_once_and_again_ends_as_the_unbroken_one(config, event, keep):
    config = changed(config, f"checkpoint.keep={keep}")
    assert not fake_run.train(config, resume="auto", kill_at=(event, 0))
    fake_run.train(config, resume="auto", kill_at=(event, 1))  # most events happen a second time
    assert fake_run.train(config, resume="auto")
    assert contents(Path(config.run)) == unbroken(config)
    known = {*run_folder.WRITTEN, "environment.json", "tensorboard"}
    assert {path.name for path in Path(config.run).iterdir() if "_before_step_" not in path.name} <= known


POOL = ("rollout.round_tokens=2", "rollout.pool=2", "loss.ratio_cap=2", "loss.ratio_tokens=carried")


@pytest.mark.parametrize(
    ("event", "times", "further"),
    [("round begins", (9, 4), ""), ("save begins", (1, 0), ""), ("save is complete", (1, 0), ""),
     ("step is done", (4, 1), "rollout.enough=mixed"), ("round begins", (9, 4), "rollout.carry=false")],
)  # fmt: skip
def test_a_run_with_responses_in_flight_that_is_killed_ends_as_the_unbroken_one(config, event, times, further):
    config = changed(config, *POOL, *further.split())
    for number in times:
        assert not fake_run.train(config, resume="auto", kill_at=(event, number))
    assert fake_run.train(config, resume="auto")
    expected = unbroken(config)
    assert contents(Path(config.run)) == expected
    in_flight = [row["rollout/carried_tokens"] for row in expected["metrics"]]
    assert all(in_flight) if config.rollout.carry else not any(in_flight)


def test_ends_at_an_epoch_s_boundary_are_exact(config):
    config = changed(config, "checkpoint.every=3")
    assert not fake_run.train(config, kill_at=("save is complete", 0))  # of step 3, the end of the first epoch
    assert not fake_run.train(config, resume=config.run, kill_at=("save is complete", 0))  # of step 6
    assert fake_run.train(config, resume=config.run)
    assert contents(Path(config.run)) == unbroken(config)


FINISHED: list[str] = []  # a finished run, copied for each test


@pytest.fixture
def finished(config, tmp_path_factory) -> c.Config:
    if not FINISHED:
        first = dataclasses.replace(config, run=str(tmp_path_factory.mktemp("finished") / "run"))
        assert fake_run.train(first, accuracies=RISING)
        FINISHED.append(first.run)
    shutil.copytree(FINISHED[0], config.run)
    return config


RISING = {0: 0.3, 1: 0.2, 3: 0.5, 5: 0.2, 7: 0.6}  # by updates of the policy; best is of step 8, before it of step 4


def steps_in(run: Path) -> dict[str, list[int]]:
    """Steps that each kind of record in a run folder is of."""
    rows = {name: [json.loads(line)["step"] for line in (run / name).open()]
            for name in ("metrics.jsonl", "evaluations.jsonl")}  # fmt: skip
    names = {name: sorted(int(path.stem[5:]) for path in (run / name).glob("step_*"))
             for name in ("checkpoints", "rollouts", "dumps")}  # fmt: skip
    return rows | names


def test_going_back_with_the_same_settings_repeats_the_steps_and_sets_the_former_ones_aside(finished, caplog):
    run, before = Path(finished.run), contents(Path(finished.run))
    caplog.set_level("INFO")
    assert fake_run.train(finished, resume=finished.run, step=2, accuracies=RISING)
    branch = run / "branches/after_step_000002"
    assert f"goes back to step 2; what it wrote after that is set aside in {branch}" in caplog.text
    assert contents(run) == before
    assert steps_in(branch) == {
        "metrics.jsonl": list(range(8)), "evaluations.jsonl": [0, 2, 4, 6, 8], "checkpoints": [4, 6, 8],
        "rollouts": [2, 3, 4, 5, 6, 7], "dumps": [2, 3, 4, 5, 6, 7],
    }  # fmt: skip
    assert json.loads((branch / "config.json").read_text())["steps"] == 8


def test_a_branch_is_a_run_that_can_be_continued(finished):
    assert fake_run.train(finished, resume=finished.run, step=2, accuracies=RISING)
    branch = str(Path(finished.run) / "branches/after_step_000002")
    longer = changed(finished, f"run={branch}", "steps=9")
    assert fake_run.train(longer, resume=branch, accuracies=RISING | {8: 0.1})
    assert steps_in(Path(branch))["metrics.jsonl"] == list(range(9))


@pytest.mark.parametrize("event", ["step is done", "save begins"])
def test_after_going_back_the_next_start_continues_the_new_branch(finished, event):
    """Killed before the first save after going back: the former step 8 must not be loaded again."""
    other = changed(finished, "loss.kl_coef=5")
    accuracies = dict.fromkeys(range(9), 0.1)
    assert not fake_run.train(other, resume=finished.run, step=2, kill_at=(event, 0), accuracies=accuracies)
    run = Path(finished.run)
    assert checkpoint_folders.latest_name(run / "checkpoints") == "step_000002"
    assert not (run / "policy").exists() and not (run / "best").exists()
    assert fake_run.train(other, resume=finished.run, accuracies=accuracies)
    alone = elsewhere(other, "alone")
    shutil.copytree(run / "branches/after_step_000002", alone.run)
    assert steps_in(run)["rollouts"] == list(range(8)) and steps_in(run)["checkpoints"] == [2, 4, 6, 8]
    assert not (run / "best").exists(), "0.1 does not beat the starting policy's 0.3"
    states = [json.loads(line)["policy/state"] for line in (run / "metrics.jsonl").open() if "policy/state" in line]
    former = [json.loads(line)["policy/state"] for line in (Path(alone.run) / "metrics.jsonl").open()
              if "policy/state" in line]  # fmt: skip
    assert states[:1] == former[:1] and all(new > old for new, old in zip(states[1:], former[1:], strict=True))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_best_is_of_the_present_branch_and_records_its_step(finished, step):
    run = Path(finished.run)
    assert json.loads((run / "best/saved_model.json").read_text()) == {"step": 8, "accuracy": 0.6}
    assert json.loads((run / "policy/saved_model.json").read_text()) == {"step": 8}
    accuracies = RISING | {5: 0.4, 7: 0.1}
    other = changed(finished, "loss.kl_coef=5")
    assert fake_run.train(other, resume=finished.run, step=step, accuracies=accuracies)
    best = run / "best/saved_model.json"
    expected = {2: {"step": 4, "accuracy": 0.5}, 4: {"step": 4, "accuracy": 0.5}, 6: None}[step]
    if expected is None:
        assert not best.exists()
    else:
        assert json.loads(best.read_text()) == expected
    former = run / f"branches/after_step_{step:06d}/best/saved_model.json"
    assert json.loads(former.read_text()) == {"step": 8, "accuracy": 0.6}


def test_what_was_abandoned_does_not_count_as_the_newest(finished):
    """keep=2: the dumps of the steps after the present checkpoints stay, whatever the former branch had."""
    config = changed(finished, "checkpoint.keep=2")
    assert not fake_run.train(config, resume=finished.run, step=2, kill_at=("save is complete", 0), accuracies=RISING)
    run = Path(finished.run)
    assert steps_in(run)["checkpoints"] == [2, 4] and steps_in(run)["dumps"] == [2, 3, 4]


def test_going_back_twice_gives_two_branches(finished):
    for _ in range(2):
        assert fake_run.train(finished, resume=finished.run, step=6, accuracies=RISING)
    names = sorted(path.name for path in (Path(finished.run) / "branches").iterdir())
    assert names == ["after_step_000006", "after_step_000006_2"]


def test_settings_in_force_before_a_step_follow_the_branches(config):
    """Settings change at step 4; going back to step 2 compares with those that step 2 was taken with."""
    assert fake_run.train(changed(config, "steps=4"))
    assert fake_run.train(changed(config, "loss.kl_coef=5"), resume=config.run)
    run = Path(config.run)

    def kl(name: str) -> float:
        return json.loads((run / name).read_text())["loss"]["kl_coef"]

    assert (kl("config_before_step_4.json"), kl("config.json")) == (0.01, 5)
    assert fake_run.train(changed(config, "loss.kl_coef=7"), resume=config.run, step=2)
    assert (kl("config_before_step_2.json"), kl("config.json")) == (0.01, 7)
    assert not (run / "config_before_step_4.json").exists()
    assert kl("branches/after_step_000002/config_before_step_4.json") == 0.01


def tree(run: Path) -> dict[str, int]:
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [0, 1, 3, 77, -2])
def test_a_step_without_a_checkpoint_is_refused_with_those_that_are_there(finished, step):
    before = tree(Path(finished.run))
    with pytest.raises(c.ConfigError, match=rf"no checkpoint after {step} steps; .* it has: 2, 4, 6, 8"):
        fake_run.train(finished, resume=finished.run, step=step)
    assert tree(Path(finished.run)) == before


@pytest.mark.parametrize("name", run_folder.LOGS)
def test_a_damaged_line_of_a_log_is_refused_before_anything_is_loaded(finished, name):
    file = Path(finished.run) / name
    file.write_text("".join(['{"step": 0}\n', '{"step": 1, "lo\n', '{"step": 2}\n']))
    before = tree(Path(finished.run))
    start = Start(finished, finished.steps, finished.run, None, {})
    with pytest.raises(c.ConfigError, match=f"{name} line 2 is damaged .*; remove this line"):
        start.check()
    assert tree(Path(finished.run)) == before


def other_problems(config: c.Config, name: str) -> c.Config:
    file = Path(config.run).parent / "others.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS[:-1]))
    return changed(config, f"{name}={file}")


def same_file_elsewhere(config: c.Config, name: str) -> c.Config:
    key = name.split(".")[1]
    file = Path(config.run).parent / "moved.jsonl"
    shutil.copy(getattr(config.data, key), file)
    return changed(config, f"{name}={file}")


FIXED = ("seed=1", "data.prompts_per_step=8", "data.buckets=((0.0,1.0,1),)", "data.system_prompt=Think.",
         "model.dtype=bfloat16", "reward_model.enabled=false", "reward_model.head_init=normal",
         "evaluation.problems=3")  # fmt: skip


@pytest.mark.parametrize("assignment", FIXED)
@pytest.mark.parametrize("resume", ["RUN", "auto"])
def test_what_is_fixed_is_refused_by_name_and_nothing_is_touched(finished, assignment, resume):
    before, key = tree(Path(finished.run)), assignment.split("=")[0]
    with pytest.raises(c.ConfigError, match=rf"cannot be resumed with {key}: .* -> .*fixed for an entire run"):
        fake_run.train(changed(finished, assignment), resume=finished.run if resume == "RUN" else resume)
    assert tree(Path(finished.run)) == before


@pytest.mark.parametrize("name", ["data.path", "data.held_out"])
def test_inputs_are_compared_by_content_wherever_they_lie(finished, name):
    before = tree(Path(finished.run))
    with pytest.raises(c.ConfigError, match=f"{name} has other contents than when"):
        fake_run.train(other_problems(finished, name), resume="auto")
    with pytest.raises(c.ConfigError, match=f"{name} has other contents"):
        Path(getattr(finished.data, name.split(".")[1])).write_text(json.dumps(QUESTIONS[0]) + "\n")
        fake_run.train(finished, resume=finished.run)
    assert tree(Path(finished.run)) == before


@pytest.mark.parametrize("name", ["data.path", "data.held_out"])
def test_an_input_may_move(finished, name):
    assert fake_run.train(same_file_elsewhere(finished, name), resume="auto")


def test_held_out_problems_cannot_come_or_go(finished):
    with pytest.raises(c.ConfigError, match=r"data\.held_out has other contents"):
        fake_run.train(changed(finished, "data.held_out="), resume="auto")


def test_another_starting_model_and_another_chat_template_are_refused(finished, model_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    moved = changed(finished, f"model.path={copy}")
    assert fake_run.train(moved, resume="auto"), "the same model elsewhere"
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(c.ConfigError, match=r"model\.path has other contents"):
        fake_run.train(moved, resume="auto")
    shutil.copy(model_folder / "model.safetensors", copy)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ message['content']", "1{{ message['content']"))
    with pytest.raises(c.ConfigError, match="tokens of the prompts has other contents"):
        fake_run.train(moved, resume="auto")


ANNOUNCED = ("optimizer.weight_decay=9.0", "reward_model.optimizer.lr=0.02", "sampling.temperature=1.2", "steps=9")
FREE = ("checkpoint.keep=2", "watchdog.policy_s=99", "supervised.steps=3")


@pytest.mark.parametrize("assignment", ANNOUNCED)
def test_a_change_is_announced_alike_however_the_run_is_resumed_and_takes_effect(config, assignment, caplog):
    caplog.set_level("INFO")
    key = assignment.split("=")[0]
    assert not fake_run.train(config, kill_at=("save is complete", 1))  # of step 4
    copy = elsewhere(config, "copy")
    shutil.copytree(config.run, copy.run)
    with_run = changed(copy, assignment)
    assert fake_run.train(changed(config, assignment), resume="auto")
    assert fake_run.train(with_run, resume=copy.run)
    told = [text.split("with other settings: ")[1] for text in caplog.messages if "with other settings" in text]
    assert len(told) == 2 and told[0] == told[1] and told[0].startswith(f"{key}: ")
    assert contents(Path(config.run)) == contents(Path(copy.run)) != unbroken(config)


@pytest.mark.parametrize("assignment", FREE)
def test_what_is_free_changes_nothing_and_is_not_announced(config, assignment, caplog):
    caplog.set_level("INFO")
    assert not fake_run.train(config, kill_at=("save is complete", 1))
    assert fake_run.train(changed(config, assignment), resume="auto")
    assert "with other settings" not in caplog.text
    assert contents(Path(config.run))["metrics"] == unbroken(config)["metrics"]


def test_fewer_steps_than_done_are_refused(finished):
    with pytest.raises(c.ConfigError, match="the run is of 4 steps, but .* continues after step 8; .* go back with"):
        fake_run.train(changed(finished, "steps=4"), resume=finished.run)
    assert fake_run.train(changed(finished, "steps=4"), resume=finished.run, step=2, accuracies=RISING)
    assert steps_in(Path(finished.run))["rollouts"] == [0, 1, 2, 3]


def test_auto_begins_where_nothing_was_saved_and_says_what_is_taken_again(config, caplog):
    caplog.set_level("INFO")
    assert not fake_run.train(config, resume="auto", kill_at=("step is done", 0))
    assert fake_run.train(changed(config, "seed=1"), resume="auto")
    assert "has no checkpoint; the run begins again, and its 1 steps are taken again" in caplog.text


def test_auto_does_not_begin_over_a_finished_policy(finished):
    """Such a folder is left by `oreal sft`, or by a run whose checkpoints were deleted."""
    shutil.rmtree(Path(finished.run) / "checkpoints")
    before = tree(Path(finished.run))
    with pytest.raises(c.ConfigError, match="holds a finished policy and no checkpoint"):
        fake_run.train(finished, resume="auto")
    assert tree(Path(finished.run)) == before


def test_auto_sets_aside_what_lies_after_the_checkpoint_that_it_can_read(finished):
    run = Path(finished.run)
    before = contents(run)
    for step in (6, 8):
        (run / f"checkpoints/step_{step:06d}/policy/state.json").write_text("{}")
    assert fake_run.train(finished, resume="auto", accuracies=RISING)
    assert contents(run) == before and (run / "branches/after_step_000004/policy").is_dir()
    for step in (2, 4, 6, 8):
        (run / f"checkpoints/step_{step:06d}/policy/state.json").write_text("{}")
    assert fake_run.train(finished, resume="auto", accuracies=RISING)
    assert contents(run) == before and steps_in(run / "branches/after_step_000000")["checkpoints"] == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["metrics.jsonl", "policy/model.safetensors", "rollouts/step_000000.jsonl",
                                  "environment.json", "speed.json", "tensorboard/events"])  # fmt: skip
def test_a_new_run_does_not_begin_over_anything_that_it_would_overwrite(config, name):
    file = Path(config.run) / name
    file.parent.mkdir(parents=True)
    file.write_text("")
    with pytest.raises(c.ConfigError, match=f"holds {name.split('/')[0]} already"):
        fake_run.train(config)
    (Path(config.run) / name).unlink()
    assert fake_run.train(changed(config, "steps=3"), kill_at=("step is done", 0)) is False


def test_a_folder_has_one_writer(config, monkeypatch):
    from oreal_megatron.runtime.folder_lock import FolderLock

    with FolderLock(Path(config.run)), pytest.raises(c.ConfigError, match="is being written by process"):
        fake_run.train(config)
    assert fake_run.train(config)


def test_a_run_without_a_better_policy_says_why_there_is_no_best(config, caplog):
    caplog.set_level("INFO")
    assert fake_run.train(config, accuracies=dict.fromkeys(range(9), 0.3))
    assert "no evaluation was better than the starting policy's" in caplog.text


def test_more_prompts_a_step_than_problems_are_announced(config, caplog):
    assert fake_run.train(changed(config, "data.prompts_per_step=20", "steps=3", "data.held_out="))
    warnings = [text for text in caplog.messages if "prompts_per_step is 20, but" in text]
    assert len(warnings) == 1 and "has 12 problems" in warnings[0]


def test_best_and_policy_wait_for_space_and_are_written_again_on_a_full_disk(config, monkeypatch, caplog, tmp_path):
    """Too little space at first, then a disk that others fill while the tensors are written."""
    monkeypatch.setattr(files, "RETRY_S", 0.01)
    inputs = read_inputs(config)
    free = iter([0, 0, 10**12, 10**12, 10**12])
    monkeypatch.setattr(disk_space, "_free_bytes", lambda folder: next(free))
    monkeypatch.setattr(policy_weights.weight_sync, "full_tensors", lambda model, head: iter([("name", 1)]))
    writes = []

    def save(path, side, hf_config, dtype, named, notes):
        writes.append(list(named))
        if len(writes) == 1:
            raise OSError(errno.ENOSPC, "full")
        path.mkdir()

    monkeypatch.setattr(policy_weights.to_hf, "save", save)
    policy_weights.save_model(inputs, "policy", None, tmp_path / "best", {})
    assert len(writes) == 2 and (tmp_path / "best").is_dir() and caplog.text.count("waiting until there is space") == 1


def test_a_file_that_a_command_writes_again_keeps_the_former_one(tmp_path, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "out.jsonl"
    files.set_aside(file)
    for number in range(3):
        file.write_text(str(number))
        files.set_aside(file)
    assert not file.exists() and [(tmp_path / f"out.jsonl.{n}").read_text() for n in (1, 2, 3)] == ["0", "1", "2"]
    assert "out.jsonl existed already; the former one is now" in caplog.text
