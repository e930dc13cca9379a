"""What `oreal evaluate` evaluates, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from oreal_megatron import settings
from oreal_megatron.config import (
    Config,
    ConfigError,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    SamplingConfig,
)
from oreal_megatron.convert import stream, to_hf
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.convert.megatron_folder import MegatronFolder
from oreal_megatron.evaluation import suites
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import distributed, files
from oreal_megatron.session.inputs import Inputs

LONGEST = 16384  # tokens of prompt and response, where no run says it
MARGIN_GB = 10.0  # of a GPU, that a cache which fills it leaves for activations, CUDA graphs and fragments


def config_of(model: str, assignments: list[str]) -> Config:
    """Of a recipe, of the run that a model lies in, or made for a lone Hugging Face folder."""
    if ".py:" in model:
        config = settings.from_recipe(model)
    else:
        config = dataclasses.replace(_of_run(Path(model)) or _alone(Path(model)), model=_named(Path(model)))
    # Training's layout is of no use here: every GPU that the engine leaves is another engine.
    return settings.override(dataclasses.replace(config, parallel=ParallelConfig(), offload=False), assignments)


def _of_run(model: Path) -> Config | None:
    """The configuration of the run folder that holds a policy or checkpoint, so that prompts are the same."""
    for folder in list(model.absolute().parents)[:3]:
        file = folder / "config.json"
        if file.is_file() and "policy_freeze_steps" in (written := files.read_object(file)):
            return settings.from_dict(written)
    return None


def _alone(model: Path) -> Config:
    positions = min(_hf(model).get("max_position_embeddings", LONGEST), LONGEST)
    engine = EngineConfig(
        max_model_len=positions, kv_cache_gib=0.0 if torch.cuda.is_available() else EngineConfig.kv_cache_gib
    )
    return Config(engine=engine, evaluation=EvaluationConfig(max_new_tokens=positions))


def _named(model: Path) -> ModelConfig:
    half = torch.cuda.is_available() and _hf(model).get("torch_dtype", _hf(model).get("dtype")) != "float32"
    return ModelConfig(str(model), dtype="bfloat16" if half else "float32")


def _hf(model: Path) -> dict[str, Any]:
    file = model / "config.json"
    return files.read_object(file) if file.is_file() else {}


def default_folder(model: str) -> Path:
    parts = Path(model.split(":")[-1]).parts
    return Path("runs/evaluations") / "_".join(parts[-3:]).strip("_/.")


def with_weights(config: Config, model: str, out: Path) -> Config:
    """A checkpoint becomes a Hugging Face folder in `out`, once. Collective."""
    source = next((folder for folder in (Path(model), Path(model) / "policy") if is_checkpoint(folder)), None)
    if source is None:
        return config
    folder, refusal = out / "model", ""
    if distributed.rank() == 0 and not folder.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        try:
            to_hf.convert(MegatronFolder(source), folder, stream.Cast(None), print, lambda count: None)
        except ConfigError as error:  # told on all ranks: the others wait for the folder
            refusal = str(error)
    if refusal := distributed.all_gather_object(refusal)[0]:
        raise ConfigError(refusal)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))


def with_cache(config: Config) -> Config:
    """A cache of 0, which a lone folder has on a GPU, becomes what the weights leave of its memory. Collective."""
    if config.engine.kv_cache_gib:
        return config
    files = HFFolder(config.model.path).weight_files
    weights = sum(file.stat().st_size for file in files) / config.engine.tensor / 2**30
    free = min(distributed.all_gather_object(torch.cuda.mem_get_info()[0])) / 2**30
    cache = free - weights - MARGIN_GB
    if cache <= 0:
        raise ConfigError(
            f"{config.model.path} takes {weights:.1f} GB of each GPU, and {free:.1f} GB are free, of which "
            f"{MARGIN_GB:g} are left for activations; cut it over several GPUs with --set engine.tensor=N"
        )
    if distributed.rank() == 0:
        print(f"engine.kv_cache_gib is {cache:.1f}: {free:.1f} GB are free on each GPU, the weights take "
              f"{weights:.1f}, and {MARGIN_GB:g} are left for activations", flush=True)  # fmt: skip
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, kv_cache_gib=cache))


def is_checkpoint(folder: Path) -> bool:
    return (folder / "metadata.json").is_file()


def claim(out: Path, inputs: Inputs, modes: dict[str, SamplingConfig], whole: dict[str, list[Prompt]]) -> None:
    """Write what the answers in `out` depend on; refuse a folder with answers of something else. Collective."""
    config = inputs.config
    settings_now = {
        "model": inputs.folder.fingerprint(),
        "system_prompt": config.data.system_prompt,
        "seed": config.seed,
        "max_model_len": config.engine.max_model_len,
        "dtype": config.engine_dtype,
        "thinking_end": list(config.verify.thinking_end),
        "judge": config.verify.judge.model or bool(config.verify.judge.urls),
        **{f"suite {Path(name).stem}": digest(mine) for name, mine in whole.items()},  # its answers are in files STEM.*
        **{name: dataclasses.asdict(sampling) for name, sampling in modes.items()},
    }
    file = out / "settings.json"
    before = files.read_object(file) if file.is_file() else {}
    changed = [key for key in before.keys() & settings_now.keys() if before[key] != settings_now[key]]
    if changed := distributed.all_gather_object(changed)[0]:
        raise ConfigError(
            f"{out} holds answers with another {', '.join(sorted(changed))}; name another folder with --out"
        )
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(before | settings_now, indent=2) + "\n")


def digest(problems: list[Prompt]) -> str:
    """Of questions and gold answers: others under the same name would be given these answers' scores."""
    text = json.dumps([(prompt.question, prompt.gold) for prompt in problems])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def report(out: Path, model: str, results: dict[str, dict[str, Any]], overlap: dict[str, list[int]] | None) -> None:
    """results.json and table.md, with what earlier calls left in them; the table is printed as well."""
    file = out / "results.json"
    before = files.read_object(file) if file.is_file() else {"suites": {}, "seen_in_training": {}}
    seen = {name: numbers for name, numbers in (before["seen_in_training"] or {}).items() if name not in results}
    seen |= overlap or {}
    results = before["suites"] | {name: before["suites"].get(name, {}) | mine for name, mine in results.items()}
    whole = {"model": model, "suites": results, "seen_in_training": seen}
    files.write_text(file, json.dumps(whole, indent=2) + "\n")
    text = table(model, {name: suites.named(name).title for name in results}, results)
    if unseen := [name for name in results if name not in seen]:
        text += f"\n{', '.join(unseen)}: not compared with training prompts; --training FILE.jsonl does.\n"
    for name, numbers in seen.items():
        text += f"\n{name}: training has seen {len(numbers)} of {results[name]['greedy']['problems']} problems.\n"
    (out / "table.md").write_text(text)
    print(text + f"\nResponses, results.json and this table: {out}")


def table(model: str, titles: dict[str, str], results: dict[str, dict[str, Any]]) -> str:
    """Markdown: this model's scores with 95 % intervals above the paper's (percent)."""
    lines = ["| model | " + " | ".join(titles.values()) + " |", "|---" * (len(titles) + 1) + "|"]

    def line(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for mode, words in (("greedy", "pass@1, greedy"), ("sampled", "avg@{k}")):
        mine = [scores.get(mode) for scores in results.values()]
        if any(mine):
            k = next(filter(None, mine))["answers_per_problem"]
            line(f"**{model}**, {words.format(k=k)}", [_cell(score, _with_interval) for score in mine])
    if any(mine):  # sampled
        line(f"**{model}**, pass@{k}", [_cell(x, lambda x: f"{100 * max(x['pass_at'].values()):.1f}") for x in mine])
        line(f"**{model}**, maj@{k}", [_cell(x, lambda x: f"{100 * x['majority']:.1f}") for x in mine])
    columns = [suites.PAPER_SUITES.index(name) if name in suites.PAPER_SUITES else None for name in titles]
    for name, scores in suites.PAPER.items() if any(column is not None for column in columns) else ():
        line(f"{name} (paper)", ["–" if column is None else f"{scores[column]:.1f}" for column in columns])
    return "\n".join(lines) + "\n"


def _cell(score: dict[str, Any] | None, text: Callable[[dict[str, Any]], str]) -> str:
    return text(score) if score else "–"


def _with_interval(score: dict[str, Any]) -> str:
    low, high = (100 * end for end in score["interval"])
    return f"{100 * score['accuracy']:.1f} ({low:.1f} to {high:.1f})"
