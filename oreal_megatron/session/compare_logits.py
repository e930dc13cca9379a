"""Comparison of two checkpoints by their logits on a text, each computed by its own framework in float32."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.convert.megatron_folder import HF_SUBFOLDER, MegatronFolder
from oreal_megatron.data import problems
from oreal_megatron.models import architecture
from oreal_megatron.records import PackingSpec, Sample
from oreal_megatron.session.session import Session

log = logging.getLogger(__name__)

TOLERANCE = 1e-5  # relative to the largest logit; the two frameworks round differently


def difference(a: HFFolder | MegatronFolder, b: HFFolder | MegatronFolder, text: str) -> str | None:
    """Return a description of the difference if the logits on `text` differ by more than rounding; log the gap."""
    tokenizer = problems.load_tokenizer(str(a.path / HF_SUBFOLDER if isinstance(a, MegatronFolder) else a.path))
    tokens = torch.tensor([tokenizer.encode(text)])
    if not tokens.numel():
        raise ConfigError("the text for --logits is empty")
    logits_a, logits_b = logits(a, tokens), logits(b, tokens)
    gap, largest = float((logits_a - logits_b).abs().max()), float(logits_a.abs().max())
    log.info("logits of %d tokens: largest difference %.1e, largest logit %.1f", tokens.shape[1], gap, largest)
    return f"logits differ by {gap:.1e}" if gap > TOLERANCE * max(1.0, largest) else None


@torch.no_grad()
def logits(source: HFFolder | MegatronFolder, tokens: Tensor) -> Tensor:
    """Return the logits [B, S, V], or the scores [B, S, 1] of a reward model, of tokens [B, S]."""
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
    from oreal_megatron.mcore import gpt_model, output_heads, scorer

    config = Config()
    with Session(config) as session:
        session.start_megatron()
        chunks = gpt_model.build(source.arch, config, source.head)
        gpt_model.load(chunks, source.arch, config, source.head, source.tensor)
        samples = [Sample(tuple(row), (), 0.0, 0.0) for row in tokens.tolist()]
        batch = packing.batch(samples, PackingSpec(tokens.numel()))
        language_model = output_heads.LanguageModelHead(chunks[-1], source.arch.vocab, 0)
        read = language_model.logits if source.head == "lm" else torch.clone
        values = scorer.MegatronScorer(chunks, lambda output, micro_batch: read(output)).score(batch)
    assert values is not None  # one process is the last pipeline stage; its only micro-batch holds the batch
    columns = source.arch.vocab if source.head == "lm" else 1
    output: Tensor = values[0][0].cpu().unflatten(0, tokens.shape)
    return output[..., :columns]
