"""Rollouts with verdicts, on which the reward model is trained before reinforcement learning.

They are lines of JSON with `question`, `response`, `verdict` and `finished`: what `oreal evaluate --rate` keeps,
and RUN/rollouts/*.jsonl of a training run. Lines hold text, so responses are tokenised again: where a tokenizer has
several ways to write a text, the tokens may differ from the sampled ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from oreal_megatron.config import ConfigError
from oreal_megatron.data.lines import Line, read_lines
from oreal_megatron.records import Outcome, Sample
from oreal_megatron.runtime import files, rollout_files

REWARDS = {Outcome.CORRECT.value: 1.0, Outcome.INCORRECT.value: -1.0, Outcome.UNKNOWN.value: 0.0}


@dataclasses.dataclass(frozen=True)
class LabelledPrompt:
    """The rollouts of one prompt with a known verdict, as samples without advantages."""

    correct: tuple[Sample, ...]
    incorrect: tuple[Sample, ...]

    @property
    def is_mixed(self) -> bool:
        """True if there are rollouts of both outcomes."""
        return bool(self.correct and self.incorrect)


@dataclasses.dataclass(frozen=True)
class LabelledRollouts:
    """All prompts of the files, and counts of their lines."""

    prompts: tuple[LabelledPrompt, ...]
    rollouts: int  # with a known verdict
    retokenised: int  # of them, those whose text has another number of tokens than was sampled
    too_long: int  # left out: longer than the model's positions


def files_of(path: str) -> list[Path]:
    """Return the JSONL files of a path: itself, or those of a run folder."""
    return [Path(path)] if not _is_run(path) else [file for step_files in _steps(path) for file in step_files]


def lines_by_step(path: str) -> Iterator[Iterable[tuple[str, Line]]]:
    """Yield the lines of a file, or of each step of a run folder, with their location."""
    if not _is_run(path):
        yield ((f"{path} line {number}", line) for number, line in read_lines(path))
        return
    for step_files in _steps(path):
        yield rollout_files.read(step_files, lambda file: read_lines(str(file)))


def _is_run(path: str) -> bool:
    return (Path(path) / rollout_files.FOLDER).is_dir()


def _steps(run: str) -> list[list[Path]]:
    """Return the files of each step of a run folder."""
    return list(rollout_files.complete_steps(Path(run)).values())


def digest(path: str) -> str:
    """Return a digest of the files of a path."""
    return files.digest(files_of(path))


def load(
    path: str, tokenizer: PreTrainedTokenizerBase, render: Callable[[str], tuple[int, ...]], max_tokens: int
) -> LabelledRollouts:
    """Return the rollouts of a JSONL file or a run folder, by prompt; `render` returns the tokens of a question.

    Raises ConfigError for a line that is not a rollout.
    """
    slots: dict[str, int] = {}  # of questions
    prompts: list[list[Sample]] = []
    retokenised = too_long = 0
    for lines in lines_by_step(path):
        for location, line in lines:
            check_rollout(location, line)
            reward = REWARDS[line["verdict"]]
            if not reward:
                continue
            slot = slots.setdefault(line["question"], len(slots))
            if slot == len(prompts):
                prompts.append([])
            samples = prompts[slot]
            prompt = samples[0].prompt_tokens if samples else render(line["question"])
            tokens = _tokens(tokenizer, line)
            retokenised += len(tokens) != line.get("tokens", len(tokens))
            if len(prompt) + len(tokens) > max_tokens:
                too_long += 1
            elif tokens:
                samples.append(Sample(prompt, tokens, reward, 0.0, rollout=(slot, len(samples))))
    by_prompt = tuple(LabelledPrompt(*_by_outcome(samples)) for samples in prompts)
    return LabelledRollouts(by_prompt, sum(map(len, prompts)), retokenised, too_long)


def check_rollout(name: str, line: Line) -> None:
    """Raise ConfigError for a line that is not a rollout with a verdict."""
    question, response, verdict = (line.get(key) for key in ("question", "response", "verdict"))
    if verdict not in REWARDS or not isinstance(response, str) or not (isinstance(question, str) and question):
        raise ConfigError(
            f"{name} is not a rollout with a verdict: question is {question!r:.80}, response {response!r:.80}, verdict "
            f"{verdict!r:.80}; expected lines as `oreal evaluate --rate` keeps them"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, line: Line) -> tuple[int, ...]:
    """Return the tokens of a response, with the stop token unless it was cut off."""
    tokens = tuple(tokenizer.encode(line["response"], add_special_tokens=False))
    return (*tokens, tokenizer.eos_token_id) if line.get("finished", True) else tokens


def _by_outcome(samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    correct = tuple(sample for sample in samples if sample.reward > 0)
    return correct, tuple(sample for sample in samples if sample.reward < 0)


def split(
    prompts: Sequence[LabelledPrompt], held_out_share: float, seed: int
) -> tuple[list[LabelledPrompt], list[LabelledPrompt]]:
    """Return the prompts to train on and those to hold out, drawn with `seed`. Raises ConfigError for too few."""
    order = list(prompts)
    random.Random(f"{seed} held out").shuffle(order)
    count = math.ceil(held_out_share * len(order))
    held_out, training = order[:count], order[count:]
    mixed = sum(prompt.is_mixed for prompt in training)
    correct = sum(len(prompt.correct) for prompt in held_out)
    incorrect = sum(len(prompt.incorrect) for prompt in held_out)
    if not (mixed and correct and incorrect):
        raise ConfigError(
            f"of {len(order)} prompts, {len(training)} are to train on, {mixed} of them with correct and incorrect "
            f"rollouts, and {len(held_out)} are held out, with {correct} correct and {incorrect} incorrect rollouts; "
            "expected none of these numbers to be 0. Rate more prompts, or change reward_training.held_out_share"
        )
    return training, held_out


class PairSampler:
    """Sampler of pairs of a correct and an incorrect rollout of one prompt: outcomes and prompts are balanced.

    In an epoch every rollout of a mixed prompt is in at least one pair; those of the rarer outcome are in several. The
    position is step x pairs and the order depends on seed and epoch only, so that nothing must be saved.
    """

    def __init__(self, prompts: Sequence[LabelledPrompt], pairs_per_step: int, seed: int):
        self.prompts = [prompt for prompt in prompts if prompt.is_mixed]
        self.pairs_per_step, self.seed = pairs_per_step, seed
        self.pairs_per_epoch = sum(max(len(prompt.correct), len(prompt.incorrect)) for prompt in self.prompts)
        self._epoch = lru_cache(2)(self._pairs)

    def take(self, step: int) -> list[Sample]:
        """Return the samples of a step, counted from 0."""
        first = step * self.pairs_per_step
        positions = (divmod(first + number, self.pairs_per_epoch) for number in range(self.pairs_per_step))
        return [sample for epoch, position in positions for sample in self._epoch(epoch)[position]]

    def _pairs(self, epoch: int) -> list[tuple[Sample, Sample]]:
        generator = random.Random(f"{self.seed} {epoch}")
        pairs: list[tuple[Sample, Sample]] = []
        for prompt in self.prompts:
            correct, incorrect = (generator.sample(group, len(group)) for group in (prompt.correct, prompt.incorrect))
            count = max(len(correct), len(incorrect))
            pairs += itertools.islice(zip(itertools.cycle(correct), itertools.cycle(incorrect), strict=False), count)
        generator.shuffle(pairs)
        return pairs
