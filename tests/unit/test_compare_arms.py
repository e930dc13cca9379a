"""Figures of the checked task: localisation of wrong steps, weights of the true errors, paired intervals."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import checked_weights
import compare_arms
import pytest
import small_model
import step_localisation
import torch
from step_localisation import TextWithWeights

from oreal_megatron.algo import packing
from oreal_megatron.config import Config
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.observe.dumped_samples import WeighedResponse
from oreal_megatron.observe.dumps import write_dump
from oreal_megatron.records import Batch, Counts, Sample, TokenWeights

QUESTION, WRONG, RIGHT = "1+2+3=", "1v4x7v\\boxed{7}", "1v3v6v\\boxed{6}"  # the second step of WRONG is wrong


def scored(response: str, correct: bool, low: int | None = None) -> TextWithWeights:
    """A response whose token at `low` has score -1 and weight 1, all others score 0 and weight 0."""
    weights = [float(position == low) for position in range(len(response))]
    tokens = WeighedResponse(0, 0, correct, [0] * len(response), weights, [-weight for weight in weights])
    return TextWithWeights(QUESTION, response, tokens)


@pytest.mark.parametrize(("low", "expected"), [(2, 1.0), (0, 0.0), (4, 0.5), (1, 0.5), (None, 0.5)])
def test_localisation_compares_the_first_wrong_digit_with_the_right_ones_before_it(low, expected):
    """Neither later steps (4) nor checks (1) count."""
    figures = step_localisation.localisation([scored(WRONG, False, low), scored(RIGHT, True, 0)])
    assert figures["score"] == figures["weight"] == expected


def test_correct_rollouts_and_those_without_wrong_step_are_not_localised():
    figures = step_localisation.localisation([scored(RIGHT, False, 2), scored(WRONG, True, 2)])
    assert figures["score"] is None and figures["weight"] is None


def test_localisation_reads_what_a_run_wrote(tmp_path):
    """From the dump of a step and the rollouts beside it, in whichever order the batch has them."""
    tokenizer = small_model.make_tokenizer()

    def sample(response: str, reward: float, index: int) -> Sample:
        prompt = tokenizer.encode(f"<|user|>{QUESTION}<|assistant|>")
        return Sample(tuple(prompt), (*tokenizer.encode(response), 3), reward, reward, None, (0, index))

    samples = [sample(WRONG, -1.0, 1), sample(RIGHT, 1.0, 0)]
    micro_batch = packing.micro_batch(samples)
    batch = Batch((micro_batch,), Counts(2, 32, 16, 16))
    score_T = torch.zeros(len(micro_batch.labels))
    score_T[2] = -1.0
    weight_T = checked_weights.first_error(score_T, micro_batch, Config())
    assert weight_T.tolist() == [float(position == 2 or position >= 16) for position in range(32)]
    weights = TokenWeights([weight_T], scores=[score_T])
    write_dump(tmp_path / "dumps/step_000012", 12, (0, 1), batch, None, weights, {}, Config())
    rows = [
        {"slot": 0, "index": 0, "question": QUESTION, "response": RIGHT, "verdict": "correct"},
        {"slot": 0, "index": 1, "question": QUESTION, "response": WRONG, "verdict": "incorrect"},
    ]
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/step_000012.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert step_localisation.of_run(tmp_path) == {"score": 1.0, "weight": 1.0, "rollout": 1.0}
    assert step_localisation.of_run(tmp_path, first_step=13) == {"score": None, "weight": None, "rollout": None}


def test_an_incorrect_response_without_wrong_step_keeps_its_weights():
    assert weights_of("1v3v6v\\boxed{7}") == [1.0] * 15


@pytest.mark.parametrize("token", [0, 1, 3, 127])
def test_sampled_special_and_unused_tokens_neither_fail_nor_move_the_error(token):
    """The embedding has more rows than the tokenizer has characters, and a policy samples any of them now and then."""
    assert weights_of("1v4x7v", token) == [0.0, 0.0, 1.0] + [0.0] * 4
    assert weights_of("1v3v", token) == [1.0] * 5


def test_a_response_with_a_token_that_its_text_lacks_is_not_localised():
    response = scored(WRONG, False, 2)
    longer = dataclasses.replace(response.tokens, tokens=[*response.tokens.tokens, 1, 3])
    figures = step_localisation.localisation([dataclasses.replace(response, tokens=longer)])
    assert figures["score"] is None


def weights_of(response: str, *further: int) -> list[float]:
    """The weights by true errors of an incorrect response, with further tokens at its end."""
    tokenizer = small_model.make_tokenizer()
    tokens = (*tokenizer.encode(response), *further)
    micro_batch = packing.micro_batch([Sample((1, *tokenizer.encode(QUESTION), 2), tokens, -1.0, -1.0)])
    return checked_weights.first_error(torch.zeros(len(tokens)), micro_batch, Config()).tolist()


def test_paired_interval_is_the_t_interval():
    mean, low, high = compare_arms.paired_interval([4.3, 5.9, 3.3])
    assert (mean, low, high) == pytest.approx((4.5, 1.25, 7.75), abs=0.01)
    assert compare_arms.paired_interval([1.0])[1:] == (-math.inf, math.inf)


def test_differences_are_paired_by_seed():
    def row(sampled: float) -> dict[str, float | None]:
        names = ("score AUC", "weight AUC", "rollout AUC", "idle, %")
        shares = dict.fromkeys(("sampled", "greedy", "area"), sampled)
        return shares | dict.fromkeys(names) | {"generation, s": 100 * sampled}

    text = compare_arms.table(
        {"base": {0: row(0.1), 1: row(0.5)}, "arm": {1: row(0.6), 0: row(0.2)}, "other": {1: row(0.7)}}
    )
    head, _, base, arm, other = text.splitlines()
    assert "+10.0 (+10.0 to +10.0)" in arm and "30.0 | 10.0, 50.0" in base
    assert "+20.0 |" in other, "the difference of seed 1 alone, without an interval"
    assert arm.endswith("| 40 | 1.33 |") and other.endswith("| 70 | 1.40 |"), "seconds, and ratio of the same seeds"
    assert "AUC" not in head and "idle" not in head, "columns without figures"


def finished_run(folder: Path, arm: str, seed: int, policy: Path, **inputs: str) -> Path:
    """A run folder as a finished run leaves it, as far as the starting policy goes."""
    run = compare_arms.run_folder(folder, arm, seed)
    (run / "policy").mkdir(parents=True)
    for file, content in (("policy/config", {}), ("config", {"model": {"path": str(policy)}}),
                          ("environment", {"inputs": inputs})):  # fmt: skip
        (run / f"{file}.json").write_text(json.dumps(content))
    return run


def test_arms_of_another_starting_policy_are_refused(tmp_path, model_folder, tied_model_folder, capsys, monkeypatch):
    """A second start of the same policy skips finished runs, as does one beside runs that recorded no policy."""
    recipe, folder = tmp_path / "recipe.py", tmp_path / "arms"
    recipe.write_text(
        "from oreal_megatron.config import Config, ModelConfig\n"
        f"def base():\n    return Config(model=ModelConfig({str(model_folder)!r}))\n"
    )
    present = HFFolder(model_folder).fingerprint()
    finished_run(folder, "base", 0, model_folder, **{"model.path": present})
    finished_run(folder, "base", 1, model_folder)
    words = ["run", str(recipe), str(folder), "--arms", "base", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["compare_arms.py", *words])
    assert compare_arms.main() == 0
    monkeypatch.setattr("sys.argv", ["compare_arms.py", *words, "--set", f"model.path={tied_model_folder}"])
    assert compare_arms.main() == 2
    refusal = f"{folder}/base/seed_0 started from another policy than {tied_model_folder} is now"
    assert refusal in capsys.readouterr().err


def test_a_table_does_not_mix_starting_policies_of_one_path(tmp_path, capsys, monkeypatch):
    first = finished_run(tmp_path, "base", 0, Path("sft"), **{"model.path": "a"})
    other = finished_run(tmp_path, "arm", 0, Path("elsewhere"), **{"model.path": "b"})
    compare_arms.refuse_mixture([first, other, finished_run(tmp_path, "old", 0, Path("sft"))])
    second = finished_run(tmp_path, "base", 1, Path("sft"), **{"model.path": "b"})
    monkeypatch.setattr("sys.argv", ["compare_arms.py", "table", str(tmp_path), "--arms", "arm,base", "--seeds", "2"])
    assert compare_arms.main() == 2
    assert f"{first} and {second} started from different policies, both at sft" in capsys.readouterr().err
