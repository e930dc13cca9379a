"""Multiply a model's hidden states by a factor without changing what it computes.

    python tools/scale_features.py MODEL OUT --factor 10

What is added to the residual stream, embeddings and the output matrices of attention and feed-forward layers, is
multiplied; the norm before every use of the stream divides by its magnitude again. The embedding must not be tied.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCALED = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")


def scale_features(folder: str, output: str, factor: float) -> None:
    """Write the scaled model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.config.tie_word_embeddings:
        raise SystemExit(f"{folder} shares its embedding with its output layer; its logits would be scaled too")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(SCALED):
                parameter.mul_(factor)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--factor", type=float, default=10.0)
    args = parser.parse_args()
    scale_features(args.model, args.output, args.factor)


if __name__ == "__main__":
    main()
