"""Tokens and texts stay with the replica that generated them: what other ranks know, fetch, write and read."""

from __future__ import annotations

import dataclasses
import json
import random
from array import array
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedDataset, ScriptedEngine, ScriptedVerifier
from thread_world import ThreadWorld

from oreal_megatron import config as c
from oreal_megatron.algo import logprob_parity, packing, selection
from oreal_megatron.config import RunStopped
from oreal_megatron.data import labelled_rollouts, skills
from oreal_megatron.evaluation import benchmark
from oreal_megatron.observe import branches
from oreal_megatron.observe.page import run_data
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import RunFolder
from oreal_megatron.plan.response_lengths import RunLengths
from oreal_megatron.records import Batch, Outcome, PackingSpec, Prompt, Rollout, Sample, Verdict
from oreal_megatron.rollout import growth
from oreal_megatron.rollout.rollout_pool import RolloutPool
from oreal_megatron.runtime import remote_values, rollout_exchange, rollout_files
from oreal_megatron.runtime.remote_values import RemoteValueRead
from oreal_megatron.verify.penalised_verifier import PenalisedVerifier

K, LIMIT = 4, 20
array_of = partial(array, "q")
ROLLOUT = Rollout(Prompt(0, "q", "1", None, (1, 2)), 3, 2, (7, 8, 9), "a b c", True, (-0.5, -1.0, -1.5))


@pytest.mark.parametrize(
    "read",
    [
        list, tuple, sorted, set, array_of, str, lambda values: f"{values}", lambda values: values[0],
        lambda values: values[-1], lambda values: 7 in values, lambda values: [*values], lambda values: values.index(7),
        lambda values: max(values), lambda values: "".join(values), lambda values: list(reversed(values)),
    ],
)  # fmt: skip
def test_what_a_rank_does_not_have_refuses_to_be_read(read):
    remote = remote_values.without_values(ROLLOUT, replica=4)
    for values in (remote.tokens, remote.logprobs, remote.text, remote.tokens[1:], (1, 2) + remote.tokens[:1]):
        with pytest.raises(RemoteValueRead, match=r"of rollout \(3, 2\) were read on .* replica 4, which generated it"):
            read(values)


def test_what_a_rank_does_not_have_is_counted_cut_and_joined():
    remote = remote_values.without_values(ROLLOUT, replica=4)
    assert len(remote.tokens) == len(remote.logprobs) == 3 and remote.tokens and remote.key == ROLLOUT.key
    assert len(remote.tokens[1:]) == 2 and len(remote.tokens[2:9]) == 1 and not remote.tokens[3:]
    assert len((1, 2) + remote.tokens) == 5 and len(remote.tokens + remote.tokens) == 6
    assert remote_values.without_values(dataclasses.replace(ROLLOUT, logprobs=None), 4).logprobs is None
    for number in (len, bool):
        with pytest.raises(RemoteValueRead):
            number(remote.text)
    for refused, read in ((TypeError, json.dumps), (ValueError, torch.tensor)):  # by their own messages
        with pytest.raises(refused):
            read(remote.tokens)


def random_samples(chance: random.Random, count: int) -> list[Sample]:
    """Return samples, some of prompts with several, some with log-probs of the engine and carried tokens."""
    samples = []
    for number in range(count):
        prompt, response = ((chance.randrange(10**6) for _ in range(chance.randint(1, 9))) for _ in range(2))
        tokens = tuple(response)
        logprobs = tuple(torch.rand(len(tokens)).tolist()) if chance.random() < 0.7 else None
        key = (number // chance.randint(1, 3), number)
        reward = chance.choice((-1.0, 1.0))
        samples.append(Sample(tuple(prompt), tokens, reward, chance.random(), logprobs, key, chance.randint(0, 3)))
    return samples


def remote_sample(sample: Sample, with_context: bool) -> Sample:
    """Return a sample as a rank knows it that does not have its rollout; `with_context`: that of a parity check."""
    rollout = dataclasses.replace(ROLLOUT, tokens=sample.response_tokens, logprobs=sample.engine_logprobs)
    remote = remote_values.without_values(rollout, 0)
    prompt = sample.prompt_tokens[:1] + remote_values.remote_tokens(rollout, 0, len(sample.prompt_tokens) - 1)
    return dataclasses.replace(
        sample,
        prompt_tokens=prompt if with_context else sample.prompt_tokens,
        response_tokens=remote.tokens,
        engine_logprobs=remote.logprobs,
    )


def as_lists(batch: Batch) -> object:
    """Return a batch as values that compare; log-probs as text, because some are nan."""
    fields = [{f.name: getattr(part, f.name) for f in dataclasses.fields(part)} for part in batch.micro_batches]
    plain = [{name: v.tolist() if torch.is_tensor(v) else v for name, v in part.items()} for part in fields]
    return str(plain), batch.counts, batch.mini_batches


@settings(max_examples=40)
@given(st.integers(0, 10**9))
def test_any_distribution_of_rollouts_gives_the_batch_of_all_of_them(seed):
    """Ranks, replicas that have a sample, data-parallel ranks, mini-batches and lengths are random."""
    chance = random.Random(seed)
    samples, size = random_samples(chance, chance.randint(1, 12)), chance.randint(1, 4)
    ranks, mini_batches = chance.randint(1, size), chance.randint(1, 3)
    spec = PackingSpec(chance.randint(1, 40), ranks=ranks, micro_batch_multiple=chance.randint(1, 2))
    specs = [dataclasses.replace(spec, rank=rank % ranks) for rank in range(size)]
    owners = [{chance.randrange(size) for _ in range(chance.randint(1, 2))} for _ in samples]
    with_context = chance.random() < 0.3
    world = ThreadWorld(size)

    def step(rank: int) -> tuple[list[Sample], Batch]:
        known = [s if rank in o else remote_sample(s, with_context) for s, o in zip(samples, owners, strict=True)]
        own = packing.own_numbers(known, specs[rank], mini_batches)
        fetched = rollout_exchange.fetch(known, own)
        return fetched, packing.batch(fetched, specs[rank], mini_batches)

    expected_values = [0] * size
    for rank, (fetched, batch) in enumerate(world.run(step)):
        assert as_lists(batch) == as_lists(packing.batch(samples, specs[rank], mini_batches))
        own = packing.own_numbers(samples, specs[rank], mini_batches)
        for number, sample in enumerate(fetched):
            has_it = rank in owners[number] or number in own
            assert remote_values.is_local(sample.response_tokens) == has_it, "its own rollouts and samples, no others"
            if has_it:
                assert sample == samples[number]
        missing = [samples[number] for number in own if rank != min(owners[number])]  # the first owner sends its own
        expected_values[rank] = sum(len(sample) + len(sample.engine_logprobs or ()) for sample in missing)
    assert world.exchanged == expected_values, "nothing else travels"


def test_values_that_no_rank_has_stop_all_ranks():
    samples = [remote_sample(random_samples(random.Random(1), 1)[0], False)]
    refusals = []

    def step(rank: int) -> None:
        with pytest.raises(RemoteValueRead, match="no rank has the values of rollout number 0, which rank 1 needs"):
            rollout_exchange.fetch(samples, [0] if rank == 1 else [])
        refusals.append(rank)

    ThreadWorld(2).run(step)
    assert sorted(refusals) == [0, 1]


def pool_config(**rollout) -> c.Config:
    return c.Config(
        rollout=c.RolloutConfig(**{"round_tokens": 4, "pool": 2.0} | rollout),
        loss=c.LossConfig(ratio_cap=2.0, ratio_tokens="carried"),
        data=c.DataConfig(prompts_per_step=3),
        sampling=c.SamplingConfig(rollouts_per_prompt=K, max_new_tokens=LIMIT),
    )


def length(position: int, index: int) -> int:
    return random.Random(f"{position} {index}").choice((1, 2, 3, 5, 7, 9, 12, 30))


def train_pool(config: c.Config, replicas: int, replica: int | None, checkpoint: dict[str, bytes], folder) -> list:
    """Return what the loop would train and log in four steps, over a pool that is saved and restored in the middle."""

    def start() -> RolloutPool:
        engine = ScriptedEngine(length, LIMIT, replicas, replica)
        return RolloutPool(config, ScriptedDataset(3), engine, ScriptedVerifier(lambda rollout: rollout.tokens[0] % 2))

    pool, results = start(), []
    for step in range(4):
        if step == 2:
            checkpoint |= pool.attachments()
            for name, content in pool.attachments().items():
                (folder / name).write_bytes(content)
            rollout_exchange.gather([])  # a barrier
            pool = start()
            pool.restore(folder, step)
        pool.engine.version = step
        rows = pool.generate(pool.take(step), config.sampling, (0, step), pool.submit)
        verdicts = pool.verdicts(rows)
        samples = selection.samples(rows, verdicts, c.SelectionConfig(keep="mixed"), (0, step))
        parity = logprob_parity.samples(rows, c.EngineConfig(parity_tokens=3), replicas)
        metrics = pool.metrics()
        del metrics["speed/idle/generate"]
        results.append((rows, verdicts, samples, parity, metrics, selection.summary(rows, verdicts, samples)))
    return results


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("enough", ["complete", "mixed"])
def test_replicas_that_know_only_their_own_rollouts_train_what_one_that_knows_all_trains(replicas, enough, tmp_path):
    config, all_of_it, saved = pool_config(enough=enough), {}, {}
    world = ThreadWorld(1)
    (expected,) = world.run(lambda rank: train_pool(config, replicas, None, all_of_it, tmp_path))
    spec = PackingSpec(50, ranks=replicas)

    def run(rank: int) -> list:
        own = dataclasses.replace(spec, rank=rank)
        results = []
        for rows, verdicts, samples, parity, metrics, summary in train_pool(config, replicas, rank, saved, tmp_path):
            assert all(
                remote_values.is_local(rollout.tokens) == (rollout.replica(replicas) == rank)
                for row in rows
                for rollout in row
            )
            batches = [
                packing.batch(rollout_exchange.fetch(some, packing.own_numbers(some, own)), own)
                for some in (samples, parity)
            ]
            flat = rollout_exchange.gather([rollout for row in rows for rollout in row])
            results.append((flat, verdicts, *map(as_lists, batches), metrics, summary))
        return results

    for rank, results in enumerate(ThreadWorld(replicas).run(run)):
        own = dataclasses.replace(spec, rank=rank)
        for (flat, *same, batch, parity_batch, metrics, summary), step in zip(results, expected, strict=True):
            rows, verdicts, samples, parity, *figures = step
            assert rank or flat == [rollout for row in rows for rollout in row], "the first rank has all on request"
            assert same == [verdicts] and [metrics, summary] == figures
            assert batch == as_lists(packing.batch(samples, own))
            assert parity_batch == as_lists(packing.batch(parity, own))
    assert saved == all_of_it, "a checkpoint has all responses in flight"


def test_ranks_of_a_replica_that_disagree_stop_all_ranks():
    blank = growth.blank_rollouts([Prompt(0, "", "", None, (1,))], 1)

    def extend(rank: int) -> None:
        grown = [growth.append(blank[0], (5, 6 + rank), None, True, 0)]
        with pytest.raises(RunStopped, match=r"one engine replica generated different responses for rollout \(0, 0\)"):
            growth.gather_growth(grown, blank, 0, replicas=1)

    ThreadWorld(2).run(extend)


def graded_step(prompts: int = 3) -> tuple[list[list[Rollout]], list[list[Verdict]]]:
    """Return [P, K] rollouts with verdicts; the prompts of a pool are not in the order of their slots."""
    rows = [
        [
            Rollout(Prompt(slot, f"question {slot}", "1", None, (1,)), slot, k, (7,) * (k + 1), f"{slot} {k}", k > 0)
            for k in range(K)
        ]
        for slot in range(prompts)
    ]
    wrong, right = Verdict(Outcome.INCORRECT, "exact", "2"), Verdict(Outcome.CORRECT, "exact", "1")
    return rows, [[right if k % 2 and slot else wrong for k in range(K)] for slot in range(prompts)]


def known_on(rank: int, rows: list[list[Rollout]], replicas: int) -> list[list[Rollout]]:
    def known(rollout: Rollout) -> Rollout:
        replica = rollout.replica(replicas)
        return rollout if replica == rank else remote_values.without_values(rollout, replica)

    return [[known(rollout) for rollout in row] for row in rows]


def write_run(path, replicas: int, steps: int = 3) -> None:
    rows, verdicts = graded_step()
    (path / "rollouts").mkdir(parents=True)
    folder = RunFolder(c.Config(run=str(path)))
    for step in range(steps):
        for replica in range(replicas):
            folder.write_rollouts(step, known_on(replica, rows, replicas), verdicts, replica, replicas)


def test_readers_of_a_run_see_the_same_whoever_wrote_its_rollouts(tmp_path):
    class Tokenizer:
        eos_token_id = 0

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return list(text.encode())

    read = []
    for replicas in (1, 2, 5):
        run = tmp_path / str(replicas)
        write_run(run, replicas)
        assert len(list((run / "rollouts").iterdir())) == 3 * replicas
        labelled = labelled_rollouts.load(str(run), Tokenizer(), lambda question: (1,), 99)
        lengths = RunLengths.of_run(run)
        pages = [run_data.rows_by_prompt(run, step) for step in run_data.rollout_steps(run)]
        failed = [skills.failed_questions(str(run), steps) for steps in (1, 3, 4)]
        assert failed == [{"question0"}, {"question0"}, set()], "a question fails once a step"
        read.append((labelled, pages, failed, [row.tolist() for row in lengths.rows]))
    assert read[0] == read[1] == read[2] and len(read[0][1]) == 3


def test_a_step_that_lacks_the_file_of_a_replica_is_left_out_and_deleted_with_the_others(tmp_path):
    write_run(tmp_path, 3)
    rollout_files.file_of(tmp_path, 1, 2, 3).unlink()
    assert list(rollout_files.complete_steps(tmp_path)) == [0, 2]
    assert [len(files) for files in rollout_files.files_by_step(tmp_path).values()] == [3, 2, 3]
    folder = RunFolder(c.Config(run=str(tmp_path)))
    folder.delete_rollouts_before(1)
    assert list(rollout_files.files_by_step(tmp_path)) == [1, 2]
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/saved_model.json").write_text('{"step": 3}')
    (tmp_path / "checkpoints/step_000002").mkdir(parents=True)
    branch = branches.set_aside(tmp_path, 2)
    assert list(rollout_files.complete_steps(branch)) == [2] and list(rollout_files.files_by_step(tmp_path)) == [1]
    folder.delete_rollouts_from(1)
    assert not rollout_files.files_by_step(tmp_path)


def test_a_rollout_of_a_replica_without_slot_or_index_is_refused_with_its_line(tmp_path):
    write_run(tmp_path, 2)
    file = rollout_files.file_of(tmp_path, 0, 1, 2)
    file.write_text(file.read_text().replace('"slot": 0, ', "", 1))
    with pytest.raises(c.ConfigError, match="replica_001_of_002.jsonl line 1 has no slot and index; remove the file"):
        run_data.rows_by_prompt(tmp_path, 0)


def test_each_replica_writes_its_rollouts_and_the_function_of_the_user_sees_all_on_the_first_rank(tmp_path):
    (tmp_path / "own.py").write_text(
        "def metric(rollouts, verdicts):\n"
        "    graded = [graded for pair in zip(rollouts, verdicts) for graded in zip(*pair)]\n"
        "    return {'letters': sum(len(r.text) for r, v in graded if v.outcome.value == 'correct')}\n"
    )
    rows, verdicts = graded_step()
    config = c.Config(
        run=str(tmp_path / "run"), steps=1, policy_freeze_steps=0,
        record=c.RecordConfig(metric=f"{tmp_path}/own.py:metric"),
    )  # fmt: skip

    def log(rank: int) -> None:
        recorder = Recorder(config)
        rollout_exchange.gather([])  # a barrier: the first rank makes the folder
        with recorder.steps() as steps:
            for step in steps:
                recorder.log(step, {"batch/samples": 4, "policy/gradient_norm": 1.0}, known_on(rank, rows, 2), verdicts)

    ThreadWorld(2).run(log)
    (logged,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert logged["own/letters"] == 4 * len("1 3"), "two correct responses of two prompts"
    written = rollout_files.complete_steps(tmp_path / "run")[0]
    assert [file.name for file in written] == [f"step_000000.replica_00{n}_of_002.jsonl" for n in (0, 1)]
    assert [row["response"] for _, row in rollout_files.read(written)] == [r.text for row in rows for r in row]


class Reference:
    """A model whose log-probs are -1 for each token, and -3 for tokens of 7."""

    def score(self, batch: Batch) -> list[torch.Tensor]:
        return [torch.where(part.labels == 7, -3.0, -1.0) for part in batch.micro_batches]


@pytest.mark.parametrize("perplexity", [0.0, 8.0])
def test_penalties_are_found_where_the_responses_are(perplexity, caplog):
    caplog.set_level("INFO")
    rows, verdicts = graded_step()
    rows[2][3] = dataclasses.replace(rows[2][3], text="\ufffd" * 9 + " end")
    rows[0][1] = dataclasses.replace(rows[0][1], tokens=(5, 5))
    config = c.PenaltyConfig(gibberish=True, overlong=True, perplexity=perplexity)

    class Graded:
        def verdicts(self, rollouts):
            return verdicts

    def judge(rank: int, replicas: int) -> list[list[Verdict]]:
        spec = PackingSpec(20, rank=rank, ranks=replicas)
        penalised = PenalisedVerifier(Graded(), config, Reference(), spec)
        return penalised.verdicts(known_on(rank, rows, replicas))

    (expected,), before = ThreadWorld(1).run(lambda rank: judge(rank, 1)), caplog.messages.copy()
    penalties = [verdict.penalty for row in expected for verdict in row]
    assert penalties.count("overlong") == 3 and penalties.count("gibberish") == 1
    assert penalties.count("perplexity") == (7 if perplexity else 0) and not expected[0][1].penalty
    caplog.clear()
    for table in ThreadWorld(2).run(lambda rank: judge(rank, 2)):
        assert table == expected
    assert caplog.messages == before and len(before) == 2 + bool(perplexity), "each kind is shown once"


def test_an_evaluation_has_its_lines_on_the_first_rank_alone(tmp_path):
    prompts = [Prompt(number, f"question {number}", "1", None, (1,)) for number in range(3)]
    rows, verdicts = graded_step()

    class Engine:
        def __init__(self, rank: int):
            self.rank = rank

        def generate(self, asked, sampling, seed, on_rollout=None):
            return known_on(self.rank, rows, 2)

    class Verifier:
        def submit(self, rollout) -> None: ...

        def verdicts(self, rollouts):
            return verdicts

    def answer(rank: int) -> object:
        sampling = c.SamplingConfig(rollouts_per_prompt=K)
        lines = benchmark.answer_suite("a", prompts, "greedy", sampling, c.Config(), tmp_path, Engine(rank), Verifier())
        return lines, benchmark.score_rows(lines, 0)

    (first, scores), (second, same_scores) = ThreadWorld(2).run(answer)
    assert [row["response"] for row in first] == [r.text for row in rows for r in row] and not second
    assert scores == same_scores and scores["accuracy"] == pytest.approx(4 / 12)
    (again, _), _ = ThreadWorld(2).run(answer)
    assert again == first
