"""Checks of resumes, long runs and faulty judges for tools/field_cases.py: R1 to R13."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from pathlib import Path
from unittest import mock

import torch
from case_workshop import PROBLEMS, Case, Result, Workshop, case

_TAKEN_BACK: dict[int, tuple[Path, Result]] = {}  # by workshop: one run serves R1, R2 and R3


def taken_back(workshop: Workshop) -> tuple[Path, Result]:
    """Return a run that went back from step 3 to step 2 with another weight decay, and what the command printed."""
    if id(workshop) not in _TAKEN_BACK:
        run = workshop.copied_run()
        words = ("train", "--resume", str(run), "--step", "2", "--set", "optimizer.weight_decay=9.0")
        _TAKEN_BACK[id(workshop)] = run, workshop.command(*words)
    return _TAKEN_BACK[id(workshop)]


@case("R1-optimizer-settings-of-a-resume")
def optimizer_settings(given: Case, workshop: Workshop) -> str | None:
    run, result = taken_back(workshop)
    if result.code:
        return result.text[-500:]
    former = workshop.finished_run[1] / "policy/model.safetensors"
    same = (run / "policy/model.safetensors").read_bytes() == former.read_bytes()
    return "the policy is that of the former weight decay" if same else None


@case("R2-going-back-starts-a-branch")
def going_back(given: Case, workshop: Workshop) -> str | None:
    run, result = taken_back(workshop)
    branch = run / "branches/after_step_000002"
    expected = ("checkpoints/step_000003", "rollouts/step_000002.jsonl", "policy/model.safetensors", "config.json")
    if missing := [name for name in expected if not (branch / name).exists()]:
        return f"{branch} has no {missing[0]}"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    return None if steps == [0, 1, 2] and "is set aside in" in result.text else f"steps {steps}: {result.text[-300:]}"


@case("R3-changed-settings-are-announced-or-refused")
def changed_settings(given: Case, workshop: Workshop) -> str | None:
    _, result = taken_back(workshop)
    if "optimizer.weight_decay: 0.01 -> 9.0" not in result.text:
        return "the other weight decay was not announced"
    run = str(workshop.copied_run())
    for assignment in ("data.prompts_per_step=4", "seed=1", "model.dtype=bfloat16", "reward_model.enabled=false"):
        refusal = workshop.until_loading("train", "--resume", run, "--set", assignment)
        if fault := refusal.refused(assignment.split("=")[0], "fixed for an entire run"):
            return f"{assignment}: {fault}"
    return None


@case("R4-held-out-problems-by-content")
def held_out(given: Case, workshop: Workshop) -> str | None:
    run, file = workshop.copied_run(), workshop.problems(*PROBLEMS[:4])
    return workshop.until_loading("train", "--resume", str(run), "--set", f"data.held_out={file}").refused(
        "data.held_out has other contents"
    )


@case("R5-best-and-policy-wait-for-space")
def space_for_models(given: Case, workshop: Workshop) -> str | None:
    from oreal_megatron.config import Config, EngineConfig, ModelConfig
    from oreal_megatron.runtime import disk_space, files
    from oreal_megatron.session import policy_weights
    from oreal_megatron.session.inputs import read_inputs

    inputs, out, looks = read_inputs(_config(Config, EngineConfig, ModelConfig, workshop)), workshop.new() / "best", []

    def free(folder: Path) -> int:
        looks.append(folder)
        return 0 if len(looks) < 3 else 10**12

    names = policy_weights.to_hf.layout_of(inputs.folder.config, torch.float32)
    tensors = ((name, inputs.folder.tensor(name)) for name in names)
    with (
        mock.patch.object(disk_space, "_free_bytes", free),
        mock.patch.object(files, "RETRY_S", 0.01),
        mock.patch.object(policy_weights.weight_sync, "full_tensors", lambda model, head: tensors),
    ):
        policy_weights.save_model(inputs, "policy", None, out, {})  # type: ignore[arg-type]
    return None if len(looks) == 3 and (out / "model.safetensors").is_file() else f"{len(looks)} looks at the disk"


def _config(config, engine, model, workshop: Workshop):  # type: ignore[no-untyped-def]
    return config(model=model(str(workshop.model)), engine=engine(max_model_len=64))


@case("R6-one-writer")
def one_writer(given: Case, workshop: Workshop) -> str | None:
    from oreal_megatron.runtime.folder_lock import FolderLock

    run = workshop.copied_run()
    with FolderLock(run):
        return workshop.command("train", "--resume", str(run)).refused("is being written by process", "one writer")


@case("R7-temperature-in-the-loss")
def temperature(given: Case, workshop: Workshop) -> str | None:
    recipe, run = workshop.recipe()
    words = [word for text in ("sampling.temperature=1.2", "steps=1") for word in ("--set", text)]
    result = workshop.command("train", recipe, *words)
    if result.code:
        return result.text[-500:]
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return None if row["parity/logprob_gap"] < 1e-4 else f"engine and trainer differ by {row['parity/logprob_gap']}"


@case("R8-no-room-for-responses")
def no_room(given: Case, workshop: Workshop) -> str | None:
    recipe, _ = workshop.recipe()
    words = ("--set", "engine.max_model_len=20", "--set", "sampling.max_new_tokens=16")
    return workshop.until_loading("train", recipe, *words).refused("sampling.max_new_tokens", "engine.max_model_len")


@case("R9-top-share-of-short-responses")
def top_share(given: Case, workshop: Workshop) -> str | None:
    from oreal_megatron.algo import packing, token_weighting
    from oreal_megatron.config import WeightsConfig
    from oreal_megatron.records import Sample

    for length in range(1, 30):
        batch = packing.micro_batch([Sample((1,), (2,) * length, 1.0, 1.0)])
        weights = token_weighting.importance(
            torch.linspace(-1, 1, length), batch, WeightsConfig(rescale="top_share", top_share=0.05)
        )
        if not (weights > 0).any():
            return f"a response of {length} tokens has no weight"
    return None


@case("R10-bounded-dumps")
def bounded_dumps(given: Case, workshop: Workshop) -> str | None:
    from oreal_megatron.config import Config, RecordConfig
    from oreal_megatron.observe.dumps import StepDumps

    run = workshop.new()
    dumps = StepDumps(Config(run=str(run), record=RecordConfig(dumps=5)), (0, 1))
    for step in range(40):
        dumps.folder_of(step).mkdir(parents=True)
        dumps.delete_old(step + 1)
    left = len(list((run / "dumps").iterdir()))
    return None if left == 5 else f"{left} dumps are left"


@case("R11-shared-memory-of-killed-jobs")
def shared_memory(given: Case, workshop: Workshop) -> str | None:
    from vllm.distributed.device_communicators import cpu_communicator

    from oreal_megatron.rollout import vllm_patches

    shared, folder = cpu_communicator._CPUSHMDistributed, workshop.new()
    memory = folder / "job-tp:0-[0-1]-cpushm_0"
    communicator = object.__new__(shared)
    communicator.group_name = "/job-tp:0-[0-1]-cpushm"
    with mock.patch.object(shared, "_init_cpu_shm", lambda self: memory.touch() or 7):
        vllm_patches.unlink_shared_memory(folder)
        handle = communicator._init_cpu_shm()
    return None if handle == 7 and not memory.exists() else "the memory keeps its name"


class _OnlyModels(http.server.BaseHTTPRequestHandler):
    """A judge that lists its models and completes nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()

    def log_message(self, *words: object) -> None: ...


@case("R12-judge-that-completes-nothing")
def judge_down(given: Case, workshop: Workshop) -> str | None:
    from oreal_megatron.config import JudgeConfig
    from oreal_megatron.runtime.chat_client import ServersDown
    from oreal_megatron.verify.judge import JudgeClient

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _OnlyModels)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = JudgeClient(JudgeConfig((f"http://127.0.0.1:{server.server_port}",), retries=1, all_down_wait_s=2.0))
    try:
        judgement = client.judge("1+1=", "2", "2.0").result(timeout=60)
        return f"it counted as up: {judgement}"
    except ServersDown as error:
        return None if "HTTP status 500" in str(error) else f"the message has no reason: {error}"
    finally:
        client.close()
        server.shutdown()


@case("R13-small-ones")
def small_ones(given: Case, workshop: Workshop) -> str | None:
    run = workshop.copied_run()
    suite = workshop.problems(name="suite.jsonl")
    if fault := workshop.until_loading("evaluate", str(run), "--suite", str(suite)).refused(str(run / "policy")):
        return f"oreal evaluate RUN: {fault}"
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(rows[0] + "\n")
    report = workshop.until_loading("report", str(run))
    shutil.rmtree(run)
    return None if "1 of 3" in report.text else f"oreal report does not tell an unfinished run: {report.text[-300:]}"
