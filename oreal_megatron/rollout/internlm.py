"""vLLM has the models of InternLM2 and 3, but transformers reads their config.json only with code of the model folder.
No such code is run here: the fields are all that vLLM needs.
"""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig


def register() -> None:
    """Let transformers read these two kinds of config.json as plain fields."""
    for kind in ("internlm2", "internlm3"):
        AutoConfig.register(kind, type(kind, (PretrainedConfig,), {"model_type": kind}), exist_ok=True)
