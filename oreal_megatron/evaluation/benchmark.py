"""Evaluation of a model on suites, and rating of training prompts. Responses are kept, so that both can be resumed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from oreal_megatron.config import Config, ConfigError, SamplingConfig
from oreal_megatron.data import overlap, problems
from oreal_megatron.data.lines import read_lines
from oreal_megatron.evaluation import results, suites
from oreal_megatron.evaluation.model_settings import with_kv_cache, with_weights
from oreal_megatron.evaluation.score import (
    SuiteScores,
    generate_and_grade,
    greedy,
    pass_rates,
    sampled,
    summarize,
)
from oreal_megatron.math_equality import rules
from oreal_megatron.observe.progress import Bar
from oreal_megatron.observe.rows import Row, read_rows, write_rows
from oreal_megatron.observe.run_folder import rollout_row
from oreal_megatron.protocols import RolloutEngine, Verifier
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import distributed, files, heartbeat, rollout_exchange
from oreal_megatron.session.inputs import Inputs, read_inputs
from oreal_megatron.session.session import Session

log = logging.getLogger(__name__)
BLOCK = 128  # problems that are generated, graded and written together


def rate_prompts(config: Config, responses: int, rated: Path, out: Path) -> SuiteScores:
    """Write the training prompts with their pass rates to `rated`, and the responses to `out`. Collective."""
    inputs = read_inputs(config)
    if rated.exists() and Path(config.data.path).exists() and rated.samefile(config.data.path):
        raise ConfigError(f"--rate {rated} is data.path, the problems themselves; give another name")
    prompts = inputs.training_prompts()
    sampling = dataclasses.replace(config.sampling, rollouts_per_prompt=responses)
    with Session(config) as session:
        session.lock(out)
        results.check_settings(out, inputs, {"rating": sampling}, {config.data.path: prompts})
        engine, verifier = session.start_engine(inputs)
        with heartbeat.phase("evaluate"):
            rows = answer_suite(config.data.path, prompts, "rating", sampling, config, out, engine, verifier)
        if distributed.rank() == 0:
            read = inputs.reader(config.data.path) or read_lines
            lines, rates = [line for _, line in read(config.data.path)], pass_rates(rows)
            key = config.data.keys.get("pass_rate", "pass_rate")  # where a training run with these keys looks for it
            rated_lines = [lines[prompt.id] | {key: rates[number]} for number, prompt in enumerate(prompts)]
            files.set_aside(rated)
            files.write_text(rated, "".join(json.dumps(line, default=str) + "\n" for line in rated_lines))
        return score_rows(rows, config.seed)


def run_benchmark(
    config: Config,
    model: str,
    suite_files: Mapping[str, tuple[suites.Suite, str]],
    limit: int,
    responses: int | None,
    training: str,
    out: Path,
) -> None:
    """Evaluate every suite, greedily and with sampled responses; write responses and scores to `out`. Collective.

    `limit`: first problems of each suite only (0: all); `training`: file of prompts to check for contamination.
    """
    if len({Path(name).stem for name in suite_files}) < len(suite_files):
        raise ConfigError(f"two of the suites {', '.join(suite_files)} have one name; their responses would be mixed")
    files.make_folder(out, "--out")
    with Session(dataclasses.replace(config, run=str(out))) as session:
        session.lock(out)
        config = with_kv_cache(with_weights(config, model, out))
        inputs = read_inputs(config)
        suite_lists = {name: suite_prompts(inputs, *suite) for name, suite in suite_files.items()}
        usable = {name: usable_prompts(inputs, name, suite) for name, suite in suite_lists.items()}
        prompts = {name: first_problems(usable[name], suite, limit) for name, suite in suite_lists.items()}
        modes = {"greedy": greedy(config)} | ({"sampled": sampled(config, responses)} if responses else {})
        results.check_settings(out, inputs, modes, usable)
        training = training or (config.data.path if Path(config.data.path).is_file() else "")
        training_questions = _questions(training, inputs)
        engine, verifier = session.start_engine(inputs)
        with heartbeat.phase("evaluate"):
            scores = {
                name: {
                    mode: score_rows(
                        answer_suite(name, prompts[name], mode, sampling, config, out, engine, verifier),
                        config.seed,
                        skipped=len(suite_lists[name][: limit or None]) - len(prompts[name]),
                    )
                    for mode, sampling in modes.items()
                }
                for name in suite_files
            }
        if distributed.rank() == 0:
            results.write_results(out, model, scores, _overlap(prompts, training_questions))


def suite_prompts(inputs: Inputs, suite: suites.Suite, path: str) -> list[Prompt]:
    """Return the problems of a suite, rendered as in training."""
    config = inputs.config
    functions = bool(config.verify.function), inputs.reader(path)
    numbers = suites.problem_numbers(suite, path, config.data.keys, *functions)
    return [prompt for prompt in inputs.rendered(path) if prompt.id in numbers]


def usable_prompts(inputs: Inputs, name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the problems that can be answered and graded; log the others by number. ConfigError if none is left.

    A prompt without room for a boxed answer, or a gold answer that the verifier cannot read, says nothing about the
    model: it is counted as skipped, not as incorrect.
    """
    longest = inputs.max_prompt_tokens
    too_long = [prompt for prompt in prompts if problems.is_overlong(prompt, longest)]
    by_rules = not inputs.config.verify.function  # a function reads golds as it likes
    unreadable = [prompt for prompt in prompts if by_rules and not rules.equals_itself(prompt.gold)]
    texts = [
        f"suite {name}: {text}, problem {problems.number_ranges(prompt.id + 1 for prompt in faulty)}"
        for faulty, text in (
            (too_long, f"no room in engine.max_model_len for a boxed answer after more than {longest} tokens"),
            (unreadable, "gold answers that the verifier cannot equate with themselves"),
        )
        if faulty
    ]
    skipped = {prompt.id for prompt in (*too_long, *unreadable)}
    if len(skipped) == len(prompts):
        raise ConfigError("; ".join(texts) or f"suite {name} has no problems")
    if texts and distributed.rank() == 0:
        log.warning("%s: %d of %d problems are skipped", "; ".join(texts), len(skipped), len(prompts))
    return [prompt for prompt in prompts if prompt.id not in skipped]


def first_problems(usable: Sequence[Prompt], suite: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Return the usable ones of the first `limit` problems of a suite (0: of all); ConfigError if there is none."""
    first = {prompt.id for prompt in suite[: limit or None]}
    chosen = [prompt for prompt in usable if prompt.id in first]
    if not chosen:
        raise ConfigError(f"none of the first {limit} problems can be used; raise --problems")
    return chosen


def answer_suite(
    name: str,
    prompts: Sequence[Prompt],
    mode: str,
    sampling: SamplingConfig,
    config: Config,
    out: Path,
    engine: RolloutEngine,
    verifier: Verifier,
) -> list[Row]:
    """Return the response lines of one suite in one mode on the first rank; [] on the others. Collective.

    Blocks of an earlier call are read, not generated again.
    """
    file = out / f"{Path(name).stem}.{mode}.jsonl"
    rows = read_complete_blocks(file, len(prompts), sampling.rollouts_per_prompt)
    answered: set[int] = distributed.all_gather_object({row["problem"] for row in rows})[0]
    with Bar(f"{name}, {mode}", len(prompts), distributed.rank() == 0) as bar:
        for start in range(0, len(prompts), BLOCK):
            block = prompts[start : start + BLOCK]
            if start not in answered:
                rollouts, verdicts = generate_and_grade(block, engine, verifier, sampling, (config.seed, -1 - start))
                flat = rollout_exchange.gather([rollout for row in rollouts for rollout in row])
                if distributed.rank() == 0:
                    graded = zip(flat, (verdict for row in verdicts for verdict in row), strict=True)
                    new_rows = [{"problem": start + r.slot, **rollout_row(r, verdict)} for r, verdict in graded]
                    with open(file, "a") as lines:
                        lines.writelines(json.dumps(row) + "\n" for row in new_rows)
                    rows += new_rows
            bar.advance(len(block))
    return [row for row in rows if row["problem"] < len(prompts)]


def read_complete_blocks(file: Path, problem_count: int, responses: int) -> list[Row]:
    """Return the lines of complete blocks, and delete the others from the file, on the first rank; [] on the others."""
    if distributed.rank():
        return []
    rows = read_rows(file)
    counts = Counter(row["problem"] // BLOCK for row in rows)
    complete = {
        block for block, count in counts.items() if count >= responses * min(BLOCK, problem_count - block * BLOCK)
    }
    rows = [row for row in rows if row["problem"] // BLOCK in complete]
    write_rows(file, rows)
    return rows


def score_rows(rows: Sequence[Row], seed: int, skipped: int = 0) -> SuiteScores:
    """Return the scores of the first rank's rows on every rank. Collective."""
    scores = None if distributed.rank() else summarize(rows, seed, skipped)
    return distributed.all_gather_object(scores)[0]


def _questions(path: str, inputs: Inputs) -> list[str] | None:
    """Return the questions of a file of training prompts; None without a file."""
    if not path:
        return None
    config = inputs.config
    lines = problems.read_problems(path, config.data.keys, bool(config.verify.function), inputs.reader(path))
    return [line["question"] for line in lines]


def _overlap(prompts: Mapping[str, Sequence[Prompt]], training: Sequence[str] | None) -> dict[str, list[int]] | None:
    """Return the problems of each suite that occur in the training prompts; None without training prompts."""
    if training is None:
        return None
    questions = {name: [prompt.question for prompt in suite] for name, suite in prompts.items()}
    return {name: overlap.find_overlap(texts, training) for name, texts in questions.items()}
