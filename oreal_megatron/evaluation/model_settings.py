"""Settings for the model to evaluate: a recipe, a model or checkpoint in a run folder, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError, EngineConfig, EvaluationConfig, ModelConfig, ParallelConfig
from oreal_megatron.convert import stream, to_hf
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.convert.megatron_folder import MegatronFolder
from oreal_megatron.runtime import distributed, files

MAX_MODEL_LEN = 16384  # tokens of prompt and response, if no run folder says otherwise
MARGIN_GIB = 10.0  # GPU memory that an automatic KV cache leaves for activations, CUDA graphs and fragments


def config_for(model: str, assignments: list[str]) -> Config:
    """Return the configuration of a recipe, of the run that a model belongs to, or of a Hugging Face folder alone."""
    if ".py:" in model or model.endswith(".py"):
        config = settings.from_recipe(model)
    else:
        base = _run_config(Path(model)) or _folder_config(Path(model))
        config = dataclasses.replace(base, model=_model_config(Path(model)))
        _require_model(Path(model))
    # The trainer's layout does not matter here: every GPU the engine does not need runs another replica.
    return settings.override(dataclasses.replace(config, parallel=ParallelConfig(), offload=False), assignments)


def with_weights(config: Config, model: str, out: Path) -> Config:
    """Convert a checkpoint to a Hugging Face folder in `out`, once, and use that as the model. Collective."""
    source = next((folder for folder in (Path(model), Path(model) / "policy") if is_checkpoint(folder)), None)
    if source is None:
        return config
    folder, refusal = out / "model", ""
    if distributed.rank() == 0:
        try:
            _convert_once(source, folder)
        except ConfigError as error:  # raised on all ranks below: the others wait for the folder
            refusal = str(error)
    if refusal := distributed.all_gather_object(refusal)[0]:
        raise ConfigError(refusal)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))


def _convert_once(source: Path, folder: Path) -> None:
    """Convert a checkpoint into `folder` unless it is there. Raises ConfigError if another checkpoint's model is."""
    record = folder.with_name("model_source.txt")
    source_digest = files.fingerprint(sorted(file for file in source.iterdir() if file.is_file()))
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        to_hf.convert(MegatronFolder(source), folder, stream.Cast(None), print, lambda count: None)
        files.write_text(record, source_digest + "\n")
    elif record.is_file() and record.read_text().strip() != source_digest:
        raise ConfigError(
            f"{folder} was converted from another checkpoint than {source} is now; choose another folder with --out"
        )


def with_kv_cache(config: Config) -> Config:
    """Replace a KV cache of 0, the default of a lone folder on a GPU, by what the weights leave free. Collective."""
    if config.engine.kv_cache_gib:
        return config
    weight_files = HFFolder(config.model.path).weight_files
    weights = sum(file.stat().st_size for file in weight_files) / config.engine.tensor / 2**30
    free = min(distributed.all_gather_object(torch.cuda.mem_get_info()[0])) / 2**30
    cache = free - weights - MARGIN_GIB
    if cache <= 0:
        raise ConfigError(
            f"{config.model.path} needs {weights:.1f} GiB of each GPU; {free:.1f} GiB are free, of which "
            f"{MARGIN_GIB:g} are reserved for activations; split it over several GPUs with --set engine.tensor=N"
        )
    if distributed.rank() == 0:
        print(f"engine.kv_cache_gib={cache:.1f}: {free:.1f} GiB free on each GPU, less {weights:.1f} for weights and "
              f"{MARGIN_GIB:g} for activations", flush=True)  # fmt: skip
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, kv_cache_gib=cache))


def _require_model(model: Path) -> None:
    """Raise ConfigError where there is no model, before a suite is looked for on the network."""
    if not model.is_dir():
        raise ConfigError(f"{model} is not a folder; name a Hugging Face folder, a checkpoint of a run or a recipe")
    if not (is_checkpoint(model) or is_checkpoint(model / "policy")):
        HFFolder(model)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a Megatron distributed checkpoint."""
    return (folder / "metadata.json").is_file()


def _run_config(model: Path) -> Config | None:
    """Return the configuration of the run folder above a model, so that prompts are the same."""
    for folder in list(model.absolute().parents)[:3]:
        file = folder / "config.json"
        if file.is_file() and "policy_freeze_steps" in (values := files.read_object(file)):
            return settings.from_dict(values)
    return None


def _folder_config(model: Path) -> Config:
    positions = min(_hf_config(model).get("max_position_embeddings", MAX_MODEL_LEN), MAX_MODEL_LEN)
    engine = EngineConfig(
        max_model_len=positions, kv_cache_gib=0.0 if torch.cuda.is_available() else EngineConfig.kv_cache_gib
    )
    return Config(engine=engine, evaluation=EvaluationConfig(max_new_tokens=positions))


def _model_config(model: Path) -> ModelConfig:
    dtype = _hf_config(model).get("torch_dtype", _hf_config(model).get("dtype"))
    half = torch.cuda.is_available() and dtype != "float32"
    return ModelConfig(str(model), dtype="bfloat16" if half else "float32")


def _hf_config(model: Path) -> dict[str, Any]:
    file = model / "config.json"
    return files.read_object(file) if file.is_file() else {}
