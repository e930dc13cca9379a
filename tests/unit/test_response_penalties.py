"""Penalties: what they hit and what they leave alone, and the reward that selection gives."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from fake_pieces import FakeEngine, FakePrompts, FakeVerifier
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.algo import response_penalties, selection
from oreal_megatron.config import Config, ConfigError, PenaltyConfig, SelectionConfig, validate
from oreal_megatron.records import Outcome, PackingSpec, Prompt, Rollout, Verdict
from oreal_megatron.verify.penalised_verifier import PenalisedVerifier

ALL = PenaltyConfig(repetition=True, overlong=True, gibberish=True)
MATHS = r"Let $\alpha=\frac{1}{3}$, so αβ ≤ ½ and ∠ABC = 60°. Naïve – “fine”; ℝ ⊂ ℂ, x² → ∞. \boxed{0.33333333}"


def response(
    text: str = "", tokens: tuple[int, ...] = (), question: str = "How many?", finished: bool = True
) -> Rollout:
    return Rollout(Prompt(0, question, "1", None, (1,)), 0, 0, tokens, text, finished)


def different_tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(10**6), count))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 400), st.integers(0, 2**32))
def test_any_loop_is_a_repetition_once_it_fills_half_or_occurs_often(phrase, before, seed):
    """Whatever its period and what comes before it: eight occurrences of an n-gram, or more than half of them old."""
    start, n = different_tokens(before, seed), ALL.ngram_tokens
    often = phrase * (2 * max(n, len(phrase)) * ALL.ngram_repeats // len(phrase) + 1)
    half = phrase * ((before + 4 * n + 2 * len(phrase)) // len(phrase) + 1)
    for loop in (often, half):
        assert response_penalties.find_penalty(response(tokens=(*start, *loop)), ALL) == "repetition"


def test_what_repeats_as_correct_solutions_do_is_no_repetition():
    once = different_tokens(1000)
    for tokens in (
        once,
        once + once,  # a solution, then the same again as a check
        once + (5,) * 200,  # a long number: its n-grams overlap
        (5,) * 60,  # shorter than two n-grams
        tuple(token for number in range(100) for token in (*once[:30], 10**6 + number)),  # a case distinction
    ):
        assert response_penalties.find_penalty(response(tokens=tokens), ALL) == "", tokens[:3]
    assert response_penalties.find_penalty(response(tokens=once * 3), ALL) == "repetition"


@pytest.mark.parametrize(
    ("text", "question", "penalty"),
    [
        (MATHS, "How many?", ""),
        ("The answer is 三", "How many?", ""),  # a few letters
        ("So 我们 得到 答案 是 three, 因此 ok", "How many?", "gibberish"),
        ("So 我们 得到 答案 是 three, 因此 ok", "有多少?", ""),
        ("значит, ответ: число два", "有多少?", "gibberish"),
        ("すなわち、答えは三である", "いくつですか", ""),  # Japanese mixes kana and Han
        ("因此答案是三个", "いくつですか", ""),
        ("x\ufffdy\ufffdz\ufffd", "How many?", "gibberish"),
        ("cut inside a letter \ufffd", "How many?", ""),
        ("a\tb\r\nc", "How many?", ""),
        ("\x00\x01\x02", "How many?", "gibberish"),
        ("itâ€™s sheâ€™s heâ€™s", "How many?", "gibberish"),
        ("São Ângela, déjà vu, Ångström, Ôé", "How many?", ""),
    ],
)
def test_scripts_and_broken_characters(text, question, penalty):
    assert response_penalties.find_penalty(response(text, question=question), ALL) == penalty


def test_each_switch_alone_and_none_by_default():
    looping, cut_off = response(tokens=(1, 2) * 400), response(finished=False)
    garbled = response("\ufffd" * 9)
    rollouts = {"repetition": looping, "overlong": cut_off, "gibberish": garbled}
    for switch in rollouts:
        config = dataclasses.replace(PenaltyConfig(), **{switch: True})
        hits = {kind for kind, rollout in rollouts.items() if response_penalties.find_penalty(rollout, config)}
        assert hits == {switch} and config.enabled
    assert not PenaltyConfig().enabled
    assert not any(response_penalties.find_penalty(rollout, PenaltyConfig()) for rollout in rollouts.values())


@given(
    st.lists(st.sampled_from(["right", "wrong", "unknown", "right!", "wrong!", "unknown!"]), min_size=2, max_size=12)
)
def test_penalties_enter_the_advantages_of_all_and_unknown_stays_unknown(outcomes):
    """RLOO on the penalised reward; a penalised response, even a correct one, is trained as an incorrect one."""
    names = {"right": Outcome.CORRECT, "wrong": Outcome.INCORRECT, "unknown": Outcome.UNKNOWN}
    prompt = Prompt(0, "q", "1", None, (1,))
    rollouts = [[Rollout(prompt, 0, k, (7, k), "", True) for k in range(len(outcomes))]]
    verdicts = [[Verdict(names[o.strip("!")], "exact", penalty="repetition" if "!" in o else "") for o in outcomes]]
    samples = selection.samples(rollouts, verdicts, SelectionConfig(keep="all", penalties=ALL), (0, 0))
    expected = [-3.0 if "!" in o else 1.0 if o == "right" else -1.0 for o in outcomes if "unknown" not in o]
    assert [sample.reward for sample in samples] == expected
    for sample in samples:
        others = (sum(expected) - sample.reward) / max(len(expected) - 1, 1)
        assert sample.advantage == pytest.approx(sample.reward - others if len(expected) > 1 else 0)
    assert selection.counts(samples).correct_tokens == 2 * expected.count(1.0)
    metrics = selection.summary(rollouts, verdicts, samples)
    assert metrics["penalty/repetition"] == sum("!" in o for o in outcomes) and metrics["penalty/overlong"] == 0
    pair = selection.samples(rollouts, verdicts, SelectionConfig(penalties=ALL), (0, 0))
    assert len(pair) == (2 if 1.0 in expected and min(expected) < 0 else 0)


class UnusedReference:
    """A reference that no penalty needs."""

    def score(self, batch):
        raise AssertionError("without a limit of the perplexity there is no forward pass")


class TokenReference:
    """A reference whose log-prob of a token is minus a tenth of its number."""

    def __init__(self):
        self.scored = []

    def score(self, batch):
        self.scored += [tuple(key) for micro_batch in batch.micro_batches for key in micro_batch.rollouts.tolist()]
        return [-micro_batch.labels / 10 for micro_batch in batch.micro_batches]


class GivenVerdicts:
    """A verifier with the verdicts of the test."""

    def __init__(self, outcomes):
        self.outcomes = outcomes

    def verdicts(self, rollouts):
        return [[Verdict(outcome, "exact") for outcome in self.outcomes]]


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 60), max_size=9), st.sampled_from(list(Outcome)), st.booleans())),
    st.floats(1.01, 400.0),
    st.integers(1, 40),
)
def test_perplexity_above_the_limit_is_penalised_however_it_is_packed(responses, limit, budget):
    prompt, config = Prompt(0, "q", "1", None, (1, 2)), PenaltyConfig(overlong=True, perplexity=limit)
    rollouts = [[Rollout(prompt, 0, k, tuple(row), "", done) for k, (row, _, done) in enumerate(responses)]]
    reference = TokenReference()
    verifier = PenalisedVerifier(
        GivenVerdicts([outcome for _, outcome, _ in responses]), config, reference, PackingSpec(budget)
    )
    (verdicts,) = verifier.verdicts(rollouts)
    scored = set()
    for k, ((tokens, outcome, done), verdict) in enumerate(zip(responses, verdicts, strict=True)):
        if done and tokens and outcome is not Outcome.UNKNOWN:
            scored.add((0, k))
            perplexity = math.prod(math.exp(token / 10) for token in tokens) ** (1 / len(tokens))
            if perplexity != pytest.approx(limit):
                assert verdict.penalty == ("perplexity" if perplexity > limit else "")
        else:
            assert verdict.penalty == ("" if done else "overlong")
        assert verdict.outcome is outcome
    assert set(reference.scored) - {(-1, -1)} == scored, "penalised, empty and unknown ones are not scored"


def test_a_limit_that_every_text_exceeds_is_refused():
    with pytest.raises(ConfigError, match="every text has at least 1"):
        validate(Config(selection=SelectionConfig(penalties=PenaltyConfig(perplexity=1.0))))


def test_the_verifier_names_penalties_and_changes_no_outcome(caplog):
    class Looping(FakeEngine):
        def rollout(self, prompt, slot, index):
            rollout = super().rollout(prompt, slot, index)
            return dataclasses.replace(rollout, tokens=(3,) * 999, text="ha " * 99) if index == 2 else rollout

    rollouts = Looping([]).generate(FakePrompts().take(0), None, (0, 0), lambda rollout: None)
    verifier = PenalisedVerifier(FakeVerifier(), ALL, UnusedReference(), PackingSpec(64))
    verifier.submit(rollouts[0][0])
    with caplog.at_level("INFO"):
        verdicts = [verifier.verdicts(rollouts) for _ in range(2)][1]
    assert [[verdict.penalty for verdict in row] for row in verdicts] == [["", "", "repetition", ""]] * 3
    plain = FakeVerifier().verdicts(rollouts)
    assert [[v.outcome for v in row] for row in verdicts] == [[v.outcome for v in row] for row in plain]
    assert verifier.verifier.submitted == 1 and caplog.text.count("first response penalised for repetition") == 1
