"""Make the quickstart's inputs: a small Qwen2 policy with random weights and its tokenizer, and addition problems.

    python tools/make_addition_task.py runs/quickstart --seed 0

writes runs/quickstart/start (model folder) and problems.jsonl, demonstrations.jsonl, held_out.jsonl. The problems are
sums of two numbers below 1000; held-out sums appear in no other file.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHARACTERS = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,:\n\\{}<>|_"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=SPECIAL[1:3]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(path: Path, seed: int, layers: int = 4, hidden: int = 128, tied: bool = False) -> None:
    """Save a Qwen2 model with random weights, and its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_problems(path: Path, seed: int, training: int, held_out: int, demonstrations: int, below: int = 1000) -> None:
    """Write distinct sums of two numbers smaller than `below` to the three files."""
    generator = random.Random(seed)
    pairs = generator.sample(range(below * below), training + held_out + demonstrations)
    sums = [(f"{pair // below}+{pair % below}=", str(pair // below + pair % below)) for pair in pairs]
    problems = [{"question": question, "gold_answer": answer, "pass_rate": None} for question, answer in sums]
    _write(path / "problems.jsonl", problems[:training])
    _write(path / "held_out.jsonl", problems[training : training + held_out])
    worked = [{"question": question, "response": f"\\boxed{{{answer}}}"} for question, answer in sums]
    _write(path / "demonstrations.jsonl", worked[training + held_out :])


def _write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--demonstrations", type=int, default=60000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make_model(args.folder / "start", args.seed)
    make_problems(args.folder, args.seed, args.training, args.held_out, args.demonstrations)
    counts = f"{args.training} problems, {args.held_out} held-out problems, {args.demonstrations} demonstrations"
    print(f"{args.folder}: a model, {counts}")


if __name__ == "__main__":
    main()
