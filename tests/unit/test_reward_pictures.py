"""Pictures of `oreal report`: calibration and token heat map, and what they are drawn from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron import config as c
from oreal_megatron.algo import packing
from oreal_megatron.cli import main
from oreal_megatron.evaluation import calibration_picture
from oreal_megatron.observe import dumps
from oreal_megatron.observe.dumped_samples import WeighedResponse, choose_pair, newest_responses
from oreal_megatron.observe.token_heat_map import COLUMNS, NEWLINE, blocks_of, place_tokens
from oreal_megatron.records import PackingSpec, Sample, TokenWeights


@given(st.lists(st.text("ab $\n", max_size=120), max_size=40))
def test_boxes_spell_the_response_in_order_without_overlap(texts):
    boxes = place_tokens(texts, [float(n) for n in range(len(texts))])
    spelled: dict[int, str] = {}
    for box in boxes:
        spelled[int(box.value)] = spelled.get(int(box.value), "") + box.text
    for number, text in enumerate(texts):
        assert spelled[number] == (text.replace("\n", NEWLINE) or " "), "an empty token is still seen"
    for box, following in zip(boxes, boxes[1:], strict=False):
        end = box.column + len(box.text)
        assert end <= COLUMNS and following.line in (box.line, box.line + 1)
        assert following.column == (end if following.line == box.line else 0)
        assert (following.line > box.line) >= box.text.endswith(NEWLINE)


@pytest.mark.parametrize(("weights", "top"), [([0.0, 0.01], 0.02), ([0.0, 0.7], 0.7), ([0.0, 0.0], 1.0)])
def test_weights_of_a_pair_have_one_scale_up_to_the_heaviest(weights, top):
    pair = [WeighedResponse(0, index, correct, [4, 5], [factor * weight for weight in weights], [0.0, 0.0])
            for index, correct, factor in ((0, False, 1.0), (1, True, 2.0 if top == 0.02 else 0.5))]  # fmt: skip
    blocks = blocks_of(pair, str)
    assert [block.limits for block in blocks] == [(0.0, top), (-1.0, 1.0)] * 2
    assert all(f"to {top:.2g}" in block.title for block in blocks[::2])


@pytest.fixture
def run(tmp_path, model_folder) -> Path:
    """A run folder with two dumped steps of two replicas; the newest one has no scores."""
    samples = [
        Sample((1, 2), (4 + slot, 5, 6, 7)[: 2 + slot], reward, reward, rollout=(slot, int(reward < 0)))
        for slot in range(3)
        for reward in (1.0, -1.0)
    ]
    config = c.Config(run=str(tmp_path), model=c.ModelConfig(str(model_folder)))
    for rank in range(2):
        batch = packing.batch(samples, PackingSpec(8, rank, 2))
        scores = [torch.arange(len(part.labels)) - 2.0 for part in batch.micro_batches]
        weights = []
        for part in batch.micro_batches:
            owner = torch.repeat_interleave(torch.arange(len(part.reward)), part.action_offsets.diff())
            weights.append(0.1 + 0.5 * (part.rollouts[owner, 0] == 1) * (part.reward[owner] < 0))
        values = TokenWeights(weights, scores=scores)
        dumps.write_dump(tmp_path / "dumps/step_000004", 4, (rank, 2), batch, None, values, {}, config)
        skipped = TokenWeights([], valid=False)
        dumps.write_dump(tmp_path / "dumps/step_000005", 5, (rank, 2), batch, None, skipped, {}, config)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "environment.json").write_text(json.dumps({"imported": {}}))
    rows = [{"step": step, "loss/reward_model": 0.7} for step in range(2)]  # as of `oreal reward-model` of 0.2.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 0, "auc": 0.5}) + "\n")
    return tmp_path


def test_the_newest_dump_with_scores_gives_the_pair_with_the_heaviest_incorrect_token(run):
    step, responses = newest_responses(run)
    assert step == 4 and sorted((r.slot, r.index) for r in responses) == [(s, k) for s in range(3) for k in (0, 1)]
    incorrect, correct = choose_pair(responses)
    assert (incorrect.slot, incorrect.correct, correct.slot, correct.correct) == (1, False, 1, True)
    assert incorrect.tokens == [5, 5, 6] and incorrect.weights == pytest.approx([0.6] * 3)
    assert correct.weights == pytest.approx([0.1] * 3) and len(correct.scores) == 3
    with pytest.raises(c.ConfigError, match="has no prompt with a correct and an incorrect response"):
        choose_pair([correct])


def test_report_draws_both_pictures_also_of_a_run_without_accuracies(run, tmp_path, capsys):
    rows = [{"step": step, "counts": [4] * 10, "correct": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]} for step in range(3)]
    (run / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = [tmp_path / name for name in ("calibration.png", "heat.png", "curves.png")]
    options = zip(("--calibration", "--heat-map", "--picture"), map(str, pictures), strict=True)
    assert main.main(["report", str(run), *(word for option in options for word in option)]) == 0
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "step 4, prompt 1 of the step: incorrect rollout 1, correct rollout 0" in told
        and "not evaluated" in told
        and "alone" in told
    )
    assert calibration_picture.sum_bins(rows).counts == [12] * 10


@pytest.mark.parametrize(
    ("option", "says"), [("--calibration", "no calibration.jsonl"), ("--heat-map", "no dump with")]
)
def test_a_run_without_what_a_picture_needs_is_refused(run, option, says, tmp_path, capsys):
    for file in run.glob("dumps/*/*.safetensors"):
        file.unlink()
    for folder in run.glob("dumps/*"):
        (folder / "step.json").unlink()
        folder.rmdir()
    assert main.main(["report", str(run), option, str(tmp_path / "out.png")]) == 2
    assert says in capsys.readouterr().err
