"""A run folder as `oreal train` leaves it, with texts that attack a page that shows them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from oreal_megatron import config as c
from oreal_megatron.algo import packing
from oreal_megatron.observe import dumps
from oreal_megatron.records import PackingSpec, Sample, TokenWeights

HOSTILE = (
    "<script>window.attacked = 1</script>",
    '"><img src=x onerror="window.attacked = 2">',
    "</script><script>window.attacked = 3</script>",
    "<svg onload=window.attacked=4>",
    "'-window.attacked=5-' `${window.attacked=6}`",
    "javascript:window.attacked=7",
    "<!-- --><style>*{display:none}</style>",
    "]]>\u2028\u2029\x00\ud800 &lt;b&gt; &amp; ${7*7} {{7*7}}",
    "<iframe srcdoc='<script>parent.attacked=8</script>'></iframe>",
    "<a href='data:text/html,<script>1</script>'>x</a><base href='http://example.org'>",
)
PROMPTS, PER_PROMPT, STEPS = 5, 4, 6


def write(run: Path, model: Path, name: str = "", with_dumps: bool = True) -> Path:
    """Write the folder; `name`: a text that stands in the configuration, in the environment and in metrics."""
    hostile = name or HOSTILE[0]
    config = c.Config(
        run=str(run), steps=STEPS, model=c.ModelConfig(str(model)), data=c.DataConfig(hostile, prompts_per_step=PROMPTS)
    )
    (run / "rollouts").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    recipe = {"name": hostile, "path": hostile, "digest": "", "text": f"# {hostile}\n"}
    environment = {"imported": {}, "git_commit": hostile, "command": hostile, "recipe": recipe, "functions": {}}
    (run / "environment.json").write_text(json.dumps(environment))
    _write_rows(run / "metrics.jsonl", [_metrics(step) for step in range(STEPS)])
    evaluations = [{"step": s, "accuracy": s / 10, "low": 0.0, "high": 0.9, "answers": 9} for s in (0, 3, 6)]
    _write_rows(run / "evaluations.jsonl", evaluations)
    bins = [{"step": step, "counts": [1] * 10, "correct": [0] * 5 + [1] * 5} for step in range(STEPS)]
    _write_rows(run / "calibration.jsonl", bins)
    for step in range(STEPS):
        _write_rows(
            run / f"rollouts/step_{step:06d}.jsonl", [row for slot in range(PROMPTS) for row in _rollouts(slot)]
        )
    if with_dumps:
        _write_dump(run, config)
    return run


def _write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _metrics(step: int) -> dict[str, float]:
    return {
        "step": step,
        "reward/pass_rate": step / STEPS,
        "reward/solvable_prompts": 4,
        "batch/mixed_prompts": 3,
        "verify/unknown": 1,
        "loss/total": 1.0 / (step + 1),
        "policy/gradient_norm": 10.0**-step,
        "policy/reference_kl": float("nan") if step == 2 else 0.01 * step,
        "rollout/response_tokens_mean": 100 + step,
        "rollout/truncated_share": 0.3,
        "seconds/generate": 2.0,
        "seconds/policy": 1.0,
        "seconds/step": 3.5,
    }


def _rollouts(slot: int) -> list[dict]:
    outcomes = ("correct", "incorrect", "unknown", "incorrect")
    methods = ("exact", "judge", "error", "truncated")
    return [
        {
            "question": f"Question {slot}: {HOSTILE[slot]} $x^{slot}$",
            "gold_answer": HOSTILE[slot + 5],
            "slot": slot,
            "index": index,
            "response": f"needle{slot}{index} {HOSTILE[(slot + index) % len(HOSTILE)]} \\boxed{{\\frac{{{index}}}7}}",
            "tokens": 10 * (index + 1),
            "finished": index != 3,
            "verdict": outcomes[index],
            "method": methods[index] if index else HOSTILE[slot],
            "extracted": HOSTILE[slot] if index < 2 else None,
            **({"reason": HOSTILE[4]} if index == 2 else {}),
        }
        for index in range(PER_PROMPT)
    ]


def _write_dump(run: Path, config: c.Config) -> None:
    samples = [
        Sample((1, 2), (4 + slot, 5, 6, 7), 1.0 - 2 * index, 1.0 - 2 * index, rollout=(slot, index))
        for slot in range(2)
        for index in (0, 1)
    ]
    batch = packing.batch(samples, PackingSpec(64))
    weights = [torch.arange(len(part.labels)) / 100 for part in batch.micro_batches]
    scores = [torch.arange(len(part.labels)) - 3.0 for part in batch.micro_batches]
    reference = [torch.full((len(part.labels),), -0.5) for part in batch.micro_batches]
    values = TokenWeights(weights, scores=scores)
    folder = run / f"dumps/step_{STEPS - 1:06d}"
    dumps.write_dump(folder, STEPS - 1, (0, 1), batch, reference, values, {}, config)
