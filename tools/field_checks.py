"""Checks of reported inputs for tools/field_cases.py, one per kind of case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from case_workshop import PROBLEMS, Case, Workshop, case, run_process
from safetensors.torch import load_file, save_file


def write_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file, which may not exist yet."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | fields))


def train(workshop: Workshop, *assignments: str, **changes: Any) -> Any:
    """Start a training up to the point where it would load models."""
    recipe, _ = workshop.recipe(**changes)
    return workshop.until_loading("train", recipe, *(word for text in assignments for word in ("--set", text)))


@case("bug-gold-is-a-solution-text")
def gold_is_a_solution(given: Case, workshop: Workshop) -> str | None:
    from oreal_megatron.config import Config, ConfigError, EngineConfig, ModelConfig
    from oreal_megatron.evaluation import benchmark, suites
    from oreal_megatron.session.inputs import read_inputs

    (name, lines), *_ = given["input"].items()
    path = workshop.problems(*lines, name=name)
    config = Config(model=ModelConfig(str(workshop.model)), engine=EngineConfig(max_model_len=512))
    inputs = read_inputs(config)
    try:
        suite = benchmark.suite_prompts(inputs, suites.named(str(path)), str(path))
        evaluated = benchmark.usable_prompts(inputs, name, suite)
        golds = [prompt.gold for prompt in (*evaluated, *inputs.prompts(str(path)))]
    except ConfigError as refusal:
        return None if "1" in str(refusal) else f"refused without the problem: {refusal}"
    return None if golds == ["7", "7"] else f"the gold answers are {golds}"


@case("bug-resume-at-missing-step")
def resume_at_a_missing_step(given: Case, workshop: Workshop) -> str | None:
    run = workshop.copied_run()
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    for step in ("77", "1"):
        if fault := workshop.until_loading("train", "--resume", str(run), "--step", step).refused("2", "3"):
            return fault
    after = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    return None if after == before else "the run folder was changed"


@case("bug-keep-below-one")
def keep_below_one(given: Case, workshop: Workshop) -> str | None:
    faults = (train(workshop, f"checkpoint.keep={keep}").refused("checkpoint.keep") for keep in (-1, 0))
    return next(filter(None, faults), None)


@case("bug-resume-with-other-inputs")
def resume_with_other_inputs(given: Case, workshop: Workshop) -> str | None:
    run, other = workshop.copied_run(), workshop.problems(*PROBLEMS[:6])
    model = workshop.model_with(change_weights)
    for assignment in (f"data.path={other}", f"model.path={model}"):
        if fault := workshop.until_loading("train", "--resume", str(run), "--set", assignment).refused():
            return f"{assignment}: {fault}"
    return None


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@case("bug-pass-at-k-label")
def pass_at_k(given: Case, workshop: Workshop) -> str | None:
    golds = [{"question": f"{number}=", "answer": str(7 + number % 3)} for number in range(6)]
    suite, out = workshop.problems(*golds, name="suite.jsonl"), workshop.new("out")
    settings = ["--set", "engine.kv_cache_gib=0.05", "--set", "engine.enforce_eager=true", "--set", "data.path="]
    result = workshop.command(
        "evaluate", str(workshop.model), "--suite", str(suite), "--samples", "3", "--out", str(out), *settings
    )
    if result.code:
        return result.text[-500:]
    rows = [json.loads(line) for line in (out / "suite.sampled.jsonl").read_text().splitlines()]
    solved = [any(row["verdict"] == "correct" for row in rows if row["problem"] == number) for number in range(6)]
    expected, table = f"{100 * sum(solved) / 6:.1f}", (out / "table.md").read_text()
    line = next((line for line in table.splitlines() if "pass@3" in line), "")
    return None if line.split("|")[2].strip() == expected else f"{line!r}; {expected} by hand"


def remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_template(text: str) -> Any:
    def change(folder: Path) -> None:
        remove_template(folder)
        (folder / "chat_template.jinja").write_text(text)

    return change


@case("bug-no-chat-template")
def no_chat_template(given: Case, workshop: Workshop) -> str | None:
    model = workshop.model_with(remove_template)
    suite = workshop.problems(name="suite.jsonl")
    evaluated = workshop.until_loading("evaluate", str(model), "--suite", str(suite), "--out", str(workshop.new()))
    return train(workshop, model=model).refused("chat template") or (
        None if evaluated.code == 0 else evaluated.refused("chat template")
    )


@case("bug-chat-template-raises")
def chat_template_raises(given: Case, workshop: Workshop) -> str | None:
    refusing = workshop.model_with(
        with_template(
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
            "{% endif %}<|user|>{{ messages[-1]['content'] }}<|assistant|>"
        )  # fmt: skip
    )
    broken = workshop.model_with(with_template("{% for message in %}"))
    empty = workshop.model_with(with_template(""))
    return (
        train(workshop, "data.system_prompt=X", model=refusing).refused("System role not supported", "system_prompt")
        or train(workshop, model=broken).refused("chat template")
        or train(workshop, model=empty).refused("chat template")
    )


@case("bug-lone-surrogate")
def lone_surrogate(given: Case, workshop: Workshop) -> str | None:
    data = workshop.problems(*given["input"]["FILE"])
    nested = workshop.problems("[" * 100_000 + "]" * 100_000)
    return train(workshop, data=data).refused(str(data), "line 1") or train(workshop, data=nested).refused("line 1")


@case("bug-nan-gold")
def nan_gold(given: Case, workshop: Workshop) -> str | None:
    data = workshop.problems(*given["input"]["FILE"])
    return train(workshop, data=data).refused(str(data), "line 1")


@case("bug-stop-token-beyond-vocabulary")
def stop_token_beyond_the_vocabulary(given: Case, workshop: Workshop) -> str | None:
    for eos in (given["input"]["generation_config.json"]["eos_token_id"], -1, True):
        model = workshop.model_with(
            lambda folder, eos=eos: write_json(folder / "generation_config.json", eos_token_id=eos)
        )
        if fault := train(workshop, model=model).refused("generation_config.json"):
            return f"eos_token_id {eos}: {fault}"
    return None


@case("bug-prompt-leaves-one-token")
def prompt_leaves_one_token(given: Case, workshop: Workshop) -> str | None:
    data = workshop.problems(*PROBLEMS, {"question": "1+" * 30 + "1", "gold_answer": "31"})
    return train(workshop, "engine.max_model_len=64", data=data).refused("17")


@case("bug-rope-fields-disagree")
def rope_fields_disagree(given: Case, workshop: Workshop) -> str | None:
    faults = []
    for fields in (
        given["input"]["config.json"],
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ):
        model = workshop.model_with(lambda folder, fields=fields: write_json(folder / "config.json", **fields))
        result = workshop.until_loading("convert", "to-megatron", str(model), str(workshop.new() / "out"))
        faults.append(result.refused("rope_"))
    return next(filter(None, faults), None)


@case("bug-weights-outside-the-index")
def weights_outside_the_index(given: Case, workshop: Workshop) -> str | None:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
        names = sorted(weights)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index = {name: file for file, part in halves.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / "old.safetensors").unlink()

    model = workshop.model_with(change)
    result = workshop.until_loading("convert", "to-megatron", str(model), str(workshop.new() / "out"))
    return result.refused("model.safetensors", "index")


@case("bug-config-field-type")
def config_field_type(given: Case, workshop: Workshop) -> str | None:
    more = [{"rope_theta": -1}, {"head_dim": 33}, {"rms_norm_eps": None, "rope_theta": True}]
    for fields in [*given["input"]["config.json"], *more]:
        model = workshop.model_with(
            lambda folder, fields=fields: set_fields_alone(folder / "config.json", "rope_parameters", fields)
        )
        result = workshop.until_loading("convert", "to-megatron", str(model), str(workshop.new() / "out"))
        if fault := result.refused("config.json"):
            return f"{fields}: {fault}"
    return None


def set_fields_alone(file: Path, replaced: str, fields: dict[str, Any]) -> None:
    """Set fields of a JSON file after removing one that might contradict them."""
    values = json.loads(file.read_text())
    values.pop(replaced, None)
    file.write_text(json.dumps(values | fields))


@case("bug-layout-below-one")
def layout_below_one(given: Case, workshop: Workshop) -> str | None:
    for flag, value in (("--tp", "0"), ("--pp", "0"), ("--vpp", "0"), ("--tp", "-2")):
        out = str(workshop.new() / "out")
        result = workshop.until_loading("convert", "to-megatron", str(workshop.model), out, flag, value)
        if fault := result.refused(flag):
            return f"{flag} {value}: {fault}"
    return None


@case("bug-temperature-zero")
def temperature_zero(given: Case, workshop: Workshop) -> str | None:
    return train(workshop, "sampling.temperature=0").refused("sampling.temperature")


@case("bug-non-finite-told-as-hand" + "-over")
def non_finite_weights(given: Case, workshop: Workshop) -> str | None:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][5, 3] = torch.nan
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    recipe, _ = workshop.recipe(model=workshop.model_with(change))
    planted = workshop.command("train", recipe)
    if planted.code not in (2, 3) or "not finite" not in planted.text or "lm_head" not in planted.text:
        return f"a NaN in lm_head: exit code {planted.code}: {planted.text[-400:]}"
    recipe, _ = workshop.recipe()
    settings = ("optimizer.lr=10", "optimizer.clip_grad=0", "optimizer.warmup_steps=0", "steps=8")
    diverged = workshop.command("train", recipe, *(word for text in settings for word in ("--set", text)))
    if "engine and trainer" in diverged.text or diverged.code not in (0, 3):
        return f"a diverging run: exit code {diverged.code}: {diverged.text[-400:]}"
    return None


@case("bug-hostname-does-not-resolve")
def hostname_does_not_resolve(given: Case, workshop: Workshop) -> str | None:
    recipe, _ = workshop.recipe()
    command = f"hostname bogus; exec python -m oreal_megatron --processes 2 train {recipe} --set steps=1"
    command += " --set optimizer.warmup_steps=0 --set reward_model.optimizer.warmup_steps=0"
    result = run_process("unshare", "--uts", "sh", "-c", command, timeout=400)
    return None if result.code == 0 else f"exit code {result.code}: {result.text[-400:]}"


@case("bug-left-over-master-addr")
def left_over_master_addr(given: Case, workshop: Workshop) -> str | None:
    for rank in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):
        recipe, _ = workshop.recipe()
        words = ("--set", "steps=1", "--set", "optimizer.warmup_steps=0", "--set")
        env = {"MASTER_ADDR": "bogus.invalid", "MASTER_PORT": "29500"} | rank
        result = workshop.command(
            "train", recipe, *words, "reward_model.optimizer.warmup_steps=0", env=env, timeout=400
        )
        if result.code:
            return f"exit code {result.code}: {result.text[-400:]}"
    return None


@case("bug-run-folder-cannot-be-made")
def run_folder_cannot_be_made(given: Case, workshop: Workshop) -> str | None:
    file = workshop.problems()
    for run in ("/proc/nothere/x", f"{file}/x"):
        if fault := train(workshop, f"run={run}").refused(run):
            return f"{run}: {fault}"
    return None


@case("bug-number-out-of-range")
def number_out_of_range(given: Case, workshop: Workshop) -> str | None:
    for assignment in given["input"]["K=V"]:
        if fault := train(workshop, assignment).refused(assignment.split("=")[0].rpartition(".")[2].split("_")[0]):
            return f"{assignment}: {fault}"
    return None


@case("bug-processes-before-verify")
def processes_before_verify(given: Case, workshop: Workshop) -> str | None:
    lines = [{"gold": "1", "pred": f"\\boxed{{{number % 3}}}"} for number in range(400)]
    answers, out = workshop.problems(*lines), workshop.new() / "out.jsonl"
    result = workshop.command("--processes", "2", "verify", str(answers), str(out))
    if result.code == 0:
        count = len(out.read_text().splitlines())
        if count != len(lines):
            return f"{count} lines of {len(lines)}"
    elif fault := result.refused("--processes"):
        return fault
    out = workshop.new() / "out"
    result = workshop.command("--processes", "2", "convert", "to-megatron", str(workshop.model), str(out))
    return None if result.code == 0 else result.refused("--processes")


@case("bug-report-of-sft-run")
def report_of_an_sft_run(given: Case, workshop: Workshop) -> str | None:
    demonstrations = [{"question": "1+2=", "response": "\\boxed{3}"}] * 4
    recipe, run = workshop.recipe()
    settings = (f"supervised.path={workshop.problems(*demonstrations)}", "supervised.steps=2",
                "supervised.samples_per_step=2", "supervised.optimizer.warmup_steps=0")  # fmt: skip
    result = workshop.command("sft", recipe, *(word for text in settings for word in ("--set", text)))
    if result.code:
        return f"oreal sft failed: {result.text[-400:]}"
    report = workshop.command("report", str(run))
    return None if report.code == 0 else report.refused()


@case("bug-verify-output-not-writable")
def verify_output_not_writable(given: Case, workshop: Workshop) -> str | None:
    answers = workshop.problems({"gold": "1", "pred": "1"})
    for out in (workshop.new(), Path("/proc/x.jsonl")):
        if fault := workshop.until_loading("verify", str(answers), str(out)).refused(str(out)):
            return f"{out}: {fault}"
    return None


@case("bug-label-as-text")
def label_as_text(given: Case, workshop: Workshop) -> str | None:
    answers, out = workshop.problems(*given["input"]["IN"]), workshop.new() / "out.jsonl"
    result = workshop.until_loading("verify", str(answers), str(out))
    if result.code == 2:
        return result.refused("label")
    # Line 1 is rightly incorrect, line 2 is a false accept.
    return None if "50.0" in result.text or "1 of 2" in result.text else result.text[-500:]


@case("bug-negative-problems")
def negative_problems(given: Case, workshop: Workshop) -> str | None:
    suite = workshop.problems(name="suite.jsonl")
    words = ("evaluate", str(workshop.model), "--suite", str(suite), "--problems", "-1", "--out", str(workshop.new()))
    return workshop.until_loading(*words).refused("--problems")


@case("bug-suite-gold-equals-nothing")
def suite_gold_equals_nothing(given: Case, workshop: Workshop) -> str | None:
    suite = workshop.problems(*given["input"]["FILE"], *PROBLEMS[:2], name="suite.jsonl")
    settings = ("--set", "engine.kv_cache_gib=0.05", "--set", "engine.enforce_eager=true")
    words = ("evaluate", str(workshop.model), "--suite", str(suite), "--out", str(workshop.new()), *settings)
    result = workshop.command(*words)
    named = "problem 1" in result.text or "line 1" in result.text
    return None if named and result.code in (0, 2) else f"exit code {result.code}: {result.text[-400:]}"


@case("bug-kernel-temperature")
def kernel_temperature(given: Case, workshop: Workshop) -> str | None:
    import oreal_kernels

    hidden, weight, labels = torch.randn(3, 8), torch.randn(16, 8), torch.tensor([1, 2, 3])
    for temperature in (0.0, -1.0, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), float("nan")):
        try:
            oreal_kernels.linear_logprob(hidden, weight, labels, temperature=temperature)
            return f"temperature {temperature} is accepted"
        except ValueError as error:
            if "temperature" not in str(error):
                return str(error)
    return None


@case("bug-kernel-float-labels")
def kernel_float_labels(given: Case, workshop: Workshop) -> str | None:
    import oreal_kernels

    hidden, weight, labels = torch.randn(3, 8), torch.randn(16, 8), torch.tensor([1, 2, 3])
    try:
        oreal_kernels.linear_logprob(hidden, weight, labels.float() + 0.7)
    except (TypeError, ValueError) as error:
        return None if "label" in str(error) else str(error)
    return "floating labels are accepted"
