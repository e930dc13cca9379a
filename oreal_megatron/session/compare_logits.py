"""Logits of a checkpoint on a text, by the framework whose checkpoint it is: transformers or Megatron, in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.convert.hf_folder import Folder
from oreal_megatron.convert.megatron_folder import DESCRIPTION, MegatronFolder
from oreal_megatron.data import problems
from oreal_megatron.models import architecture
from oreal_megatron.records import PackingSpec, Sample

TOLERANCE = 1e-5  # of the largest logit; the two frameworks round differently


def difference(a: Folder | MegatronFolder, b: Folder | MegatronFolder, text: str) -> str | None:
    """A sentence when the logits of the two on `text` differ by more than rounding; prints by how much they do."""
    tokenizer = problems.load_tokenizer(str(a.path / DESCRIPTION if isinstance(a, MegatronFolder) else a.path))
    tokens = torch.tensor([tokenizer.encode(text)])
    if not tokens.numel():
        raise ConfigError("the text for --logits is empty")
    ours, theirs = logits(a, tokens), logits(b, tokens)
    gap = float((ours - theirs).abs().max())
    print(f"logits of {tokens.shape[1]} tokens: largest difference {gap:.1e}, largest logit {ours.abs().max():.1f}")
    return f"logits differ by {gap:.1e}" if gap > TOLERANCE * max(1.0, float(ours.abs().max())) else None


@torch.no_grad()
def logits(source: Folder | MegatronFolder, tokens: Tensor) -> Tensor:
    """[B, S, V] logits, or [B, S, 1] scores of a reward model, of tokens [B, S]."""
    if isinstance(source, MegatronFolder):
        return _by_megatron(source, tokens)
    if "auto_map" in source.config:
        raise ConfigError(f"{source.path} brings its own Python code, which is not run; --logits needs Megatron's side")
    heads = {"lm": AutoModelForCausalLM, "scalar": AutoModelForTokenClassification}
    model = heads[architecture.head(source.config)].from_pretrained(source.path, dtype=torch.float32).eval()
    output: Tensor = model(tokens).logits
    return output


def _by_megatron(source: MegatronFolder, tokens: Tensor) -> Tensor:
    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import gpt_model, output_heads, parallel, scorer

    config = Config()
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    chunks = gpt_model.build(source.arch, config, source.head)
    gpt_model.load(chunks, source.arch, config, source.head, source.tensor)
    batch = packing.batch([Sample(tuple(row), (), 0.0, 0.0) for row in tokens.tolist()], PackingSpec(tokens.numel()))
    language_model = output_heads.LanguageModelHead(chunks[-1], source.arch.vocab, 0)
    read = language_model.logits if source.head == "lm" else torch.clone
    values = scorer.MegatronScorer(chunks, lambda output, micro_batch: read(output)).score(batch)
    parallel.stop()
    assert values is not None  # one process is the last pipeline stage
    return values[0].cpu().unflatten(0, tokens.shape)[..., : source.arch.vocab if source.head == "lm" else 1]
