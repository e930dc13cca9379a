"""config.json of the models in the recipes, to plan without their folders.

The authors' SFT models have the shapes of the Qwen2.5 bases they were trained from; T1's 9B stands for a model of the
Llama layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.models import architecture
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.runtime import files


def _qwen(layers: int, hidden: int, ffn: int, heads: int, groups: int, positions: int, theta: float) -> dict[str, Any]:
    return dict(
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=152064,
        max_position_embeddings=positions,
        rope_theta=theta,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )


SIZES = {"7B": (28, 3584, 18944, 28, 4), "14B": (48, 5120, 13824, 40, 8), "32B": (64, 5120, 27648, 40, 8)}
YI_9B = _qwen(48, 4096, 11008, 32, 4, 16384, 5e6) | dict(architectures=["LlamaForCausalLM"], vocab_size=64000)
CONFIGS = {
    **{f"{name}": _qwen(*SIZES["7B"], 32768, 1e6) for name in ("Qwen2.5-7B", "Qwen2.5-7B-Instruct", "OREAL-7B-SFT")},
    **{f"{name}": _qwen(*SIZES["14B"], 32768, 1e6) for name in ("Qwen2.5-14B", "Qwen2.5-14B-Instruct", "T1-SFT-14B")},
    **{
        f"{name}": _qwen(*SIZES["32B"], 32768, 1e6)
        for name in ("Qwen2.5-32B", "Qwen2.5-32B-Instruct", "OREAL-32B-SFT", "T1-SFT-32B")
    },
    **{f"{name}": YI_9B for name in ("Yi-1.5-9B-Chat-16K", "T1-SFT-9B")},
    "DeepSeek-R1-Distill-Qwen-7B": _qwen(*SIZES["7B"], 131072, 1e4),
}


def read_teacher(config: Config) -> Architecture | None:
    """Return the architecture of the teacher of `oreal distill`, None where the recipe names none."""
    path = config.distillation.teacher
    return architecture.read(read_config(path)[0]) if path else None


def read_config(path: str) -> tuple[dict[str, Any], bool]:
    """Return the config.json of a model folder, or of a published model of that name; and whether it was read."""
    file = Path(path) / "config.json"
    if file.is_file():
        return files.read_object(file), True
    if (name := Path(path).name) in CONFIGS:
        return CONFIGS[name], False
    raise ConfigError(
        f"{path} is not a model folder, and {name!r} is not a published model that the plan knows "
        f"({', '.join(CONFIGS)}); put the model's config.json into a folder and set --set model.path=FOLDER"
    )
