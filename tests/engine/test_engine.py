"""Real Megatron and real vLLM in the same processes: after an update they are the same policy, and when they are not,
the parity check says so."""

from __future__ import annotations

import dataclasses

import pytest

from oreal_megatron.runtime.remote_values import is_local

LONG_PROMPT = 200  # tokens; longer than vLLM's cache block (128 on CPU), so that prefixes are cached


def story(folder: str, engine_tensor: int, tensor: int, pipeline: int, packed: bool, samples: list) -> dict:
    """Generate, update, weight sync, generate again; then ways in which the engine goes wrong.

    `packed`: the engine has packed its weights after loading, although the trainer wants to write to them.
    """
    from oreal_megatron import config as c
    from oreal_megatron.mcore import parallel, trained_models
    from oreal_megatron.records import Prompt
    from oreal_megatron.session import policy_weights
    from oreal_megatron.session.inputs import read_inputs
    from oreal_megatron.session.session import start_engine

    config = c.Config(
        model=c.ModelConfig(folder),
        parallel=c.ParallelConfig(tensor, pipeline),
        engine=c.EngineConfig(
            tensor=engine_tensor, max_model_len=256, max_num_seqs=16, kv_cache_gib=0.1, enforce_eager=True
        ),
        sampling=c.SamplingConfig(rollouts_per_prompt=2, temperature=1.2, top_p=0.9, max_new_tokens=12),
        supervised=c.SupervisedConfig(optimizer=c.OptimizerConfig(lr=0.02, min_lr=0.02, warmup_steps=0)),
        verify=c.VerifyConfig(workers=1),
    )
    inputs = read_inputs(config)
    parallel.start_process_group()
    gather = dataclasses.replace(config, engine=dataclasses.replace(config.engine, transport="gather"))
    engine, _ = start_engine(dataclasses.replace(inputs, config=gather if packed else config))
    parallel.start_megatron(config.parallel, seed=0)
    policy = trained_models.Policy(inputs.arch, config, inputs.folder.tensor)
    prompts = [Prompt(i, "", "", None, tuple(4 + (7 * i + j) % 70 for j in range(LONG_PROMPT))) for i in range(3)]
    table = Story(config, policy, engine, prompts, samples)
    weight_sync = policy_weights.connect(policy, engine)
    own, one = table.own(prompts), table.own(prompts[:1], per_prompt=1)

    result = {
        "nothing to do": weight_sync.sync(0),
        "before": table.gap(0),
        "at temperature 1": table.gap_at_temperature_1(),
        "oracle": table.differs_from_transformers(inputs),
        "first": table.tokens(0),
        "again": table.tokens(0),
        "other": table.tokens(1),
    }
    result["rounds"], carried = table.rounds_equal_one_go(), table.grow_by_5()
    table.update()
    result["missed"] = table.gap(0)
    engine.version = policy.updates
    result["stale"] = table.gap(0)
    engine.version = 0
    result["metrics"] = weight_sync.sync(1)
    result["after"] = table.gap(0)
    result["carried"] = table.gaps_of_carried(carried)
    if not packed:
        result["as vLLM loads"] = table.equals_what_vllm_loads()
        result["planted"] = table.mismatches_of_a_planted_error(weight_sync)
    result |= {"version": engine.version, "own": own, "one": one, "says": weight_sync.description}
    result["woken"] = table.order_of_waking(weight_sync)
    result["swapped"] = table.gap_with_a_query_head_swapped_for_a_key()
    result["refused"] = table.reset_refused_while_a_request_runs(weight_sync)
    parallel.stop(engine)
    return result


class Story:
    def __init__(self, config, policy, engine, prompts, samples):
        self.config, self.policy, self.engine, self.prompts, self.samples = config, policy, engine, prompts, samples

    def gap(self, step: int) -> str | float:
        """Mean log-prob difference of the parity check in the loop, or its message."""
        from oreal_megatron.algo.logprob_parity import LogprobMismatch
        from oreal_megatron.loop import check_logprob_parity
        from oreal_megatron.mcore import parallel

        rollouts = self.engine.generate(self.prompts, self.config.sampling, (0, step))
        try:
            spec = parallel.packing_spec(4096)
            return check_logprob_parity(self.config, self.engine, self.policy, rollouts, spec, step)[
                "parity/logprob_gap"
            ]
        except LogprobMismatch as refusal:
            return str(refusal)

    def rounds_equal_one_go(self) -> bool:
        """Greedy responses in three rounds, whose requests begin with the tokens of the round before, and at once."""
        from oreal_megatron.rollout import growth

        blank = growth.blank_rollouts(self.prompts, 2)
        greedy = dataclasses.replace(self.config.sampling, temperature=0.0)
        grown = blank
        for _ in range(3):
            grown = self.engine.extend(grown, greedy, (0, 0), None, 5)
        at_once = self.engine.extend(blank, greedy, (0, 0))
        return [(r.tokens, r.text, r.finished) for r in grown] == [(r.tokens, r.text, r.finished) for r in at_once]

    def grow_by_5(self) -> list:
        from oreal_megatron.rollout import growth

        return self.engine.extend(growth.blank_rollouts(self.prompts, 2), self.config.sampling, (0, 8), None, 5)

    def gaps_of_carried(self, carried: list) -> dict[str, float]:
        """The parity check of responses that the present version finishes; it with the bound or the versions off."""
        from oreal_megatron import config as c
        from oreal_megatron.algo.logprob_parity import LogprobMismatch
        from oreal_megatron.loop import check_logprob_parity
        from oreal_megatron.mcore import parallel

        unfinished = [rollout for rollout in carried if not rollout.finished]
        grown = self.engine.extend(unfinished, self.config.sampling, (0, 9), None, 7)
        rows = [[dataclasses.replace(rollout, carried=5)] for rollout in grown]
        config = dataclasses.replace(self.config, rollout=c.RolloutConfig(7, pool=2.0))
        forgotten = [[dataclasses.replace(r, carried=0) for r in row] for row in rows]
        results = {"versions": {tuple(version for version, _ in rollout.versions) for rollout in grown}}
        cases = {"check": (config, rows), "beyond": (self.config, rows), "forgotten": (config, forgotten)}
        for name, (settings, table) in cases.items():
            try:
                spec = parallel.packing_spec(4096)
                metrics = check_logprob_parity(settings, self.engine, self.policy, table, spec, 9)
                results[name] = metrics["parity/logprob_gap"]
            except LogprobMismatch as refusal:
                results[name] = str(refusal)
        return results

    def gap_at_temperature_1(self) -> str | float:
        """The parity check where the trainer leaves the temperature out."""
        head = self.policy.language_model
        head.temperature, before = 1.0, head.temperature
        gap = self.gap(0)
        head.temperature = before
        return gap

    def differs_from_transformers(self, inputs) -> list[float]:
        """Largest difference of the log-probs of engine, policy and reference from log softmax(logits / 1.2)."""
        import torch
        from transformers import AutoModelForCausalLM

        from oreal_megatron.algo import logprob_parity, packing
        from oreal_megatron.mcore import parallel, trained_models
        from oreal_megatron.runtime import distributed, rollout_exchange

        table = self.engine.generate(self.prompts, self.config.sampling, (0, 0))
        samples = logprob_parity.samples(table, self.config.engine, self.engine.replicas)
        spec = parallel.packing_spec(4096)
        batch = packing.batch(rollout_exchange.fetch(samples, packing.own_numbers(samples, spec)), spec)
        reference = trained_models.Reference(inputs.arch, self.config, inputs.folder.tensor)
        scored = [model.score(batch) for model in (self.policy, reference)]
        model = AutoModelForCausalLM.from_pretrained(self.config.model.path, dtype=torch.float32).eval()
        worst = [0.0, 0.0, 0.0]
        for number, part in enumerate(batch.micro_batches):
            if scored[0] is None or not len(part.labels):
                continue
            starts = part.sequence_offsets
            logits = [model(part.tokens[a:b][None]).logits[0] for a, b in zip(starts, starts[1:], strict=False)]
            logp = torch.log_softmax(torch.cat(logits).detach() / 1.2, 1)
            expected = logp[part.action_index].gather(1, part.labels[:, None])[:, 0]
            given = (part.engine_logprobs, scored[0][number], scored[1][number])
            worst = [max(gap, float((x - expected).abs().max())) for gap, x in zip(worst, given, strict=True)]
        return [max(gaps) for gaps in zip(*distributed.all_gather_object(worst), strict=True)]

    def tokens(self, step: int) -> list:
        """All answers on the first rank, and those that another one has, or stand-ins for them.

        The generators that vLLM may draw from have parted on every rank.
        """
        import numpy
        import torch

        from oreal_megatron.runtime import distributed, rollout_exchange

        torch.manual_seed(distributed.rank())
        numpy.random.seed(distributed.rank())
        rollouts = self.engine.generate(self.prompts, self.config.sampling, (0, step))
        return [rollout.tokens for rollout in rollout_exchange.gather([rollout for row in rollouts for rollout in row])]

    def own(self, prompts, per_prompt: int = 2) -> list[tuple]:
        """(slot, index, tokens) of what this rank itself generated, in order; generators have parted as above."""
        import torch

        from oreal_megatron.runtime import distributed

        heard, speaks = [], self.engine.reports
        torch.manual_seed(distributed.rank() + 7)
        self.engine.reports = True
        sampling = dataclasses.replace(self.config.sampling, rollouts_per_prompt=per_prompt)
        self.engine.generate(prompts, sampling, (0, 0), heard.append)
        self.engine.reports = speaks
        return [(rollout.slot, rollout.index, rollout.tokens) for rollout in heard]

    def order_of_waking(self, weight_sync) -> list:
        """Return the calls to a sleeping engine in a weight sync, and whether buffers were freed by then."""
        import weakref

        from oreal_megatron.rollout.device import EngineMemory

        asked, buffers, engine, llm = [], [], self.engine, self.engine.llm

        class Sleeper:  # a CPU cannot sleep; everything else is the engine's own
            def __getattr__(self, name):
                return getattr(llm, name)

            def sleep(self, level):
                asked.append(f"sleep {level}")

            def wake_up(self, tags):
                gone = all(buffer() is None for buffer in buffers)
                asked.append(("wake", *tags, f"{len(buffers)} buffers", f"gone: {gone}"))

            def reset_prefix_cache(self):
                asked.append("reset")
                return llm.reset_prefix_cache()

        if weight_sync.direct:
            made = weight_sync.direct.allocate_buffers

            def watched():
                pairs = made()
                buffers.extend(weakref.ref(buffer) for pair in pairs for buffer in pair)
                return pairs

            weight_sync.direct.allocate_buffers = watched
        sleeper = Sleeper()
        engine.llm, engine.memory = sleeper, EngineMemory(sleeper, True)
        engine.sleep()
        engine.sleep()
        weight_sync.sync(engine.version)
        engine.llm, engine.memory = llm, EngineMemory(llm, False)
        return asked

    def update(self) -> None:
        from oreal_megatron.algo import packing
        from oreal_megatron.mcore import parallel

        self.policy.imitate(packing.batch(self.samples, parallel.packing_spec(4096)))

    def gap_with_a_query_head_swapped_for_a_key(self) -> str | float:
        from oreal_megatron.reshard.weight_sync import full_tensors

        weights = {name: tensor.clone() for name, tensor in full_tensors(self.policy)}
        query, key = (weights[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qk")
        head = self.policy.arch.head_dim
        query[:head], key[:head] = key[:head].clone(), query[:head].clone()
        self.engine.load(weights.items())
        self.engine.accept(self.policy.updates)
        return self.gap(0)

    def equals_what_vllm_loads(self) -> bool:
        """Bit by bit, the parameters that `direct` wrote and those that vLLM's own loader makes of full tensors."""
        import torch

        from oreal_megatron.reshard.weight_sync import full_tensors

        written = {name: tensor.clone() for name, tensor in self.engine.live()[0].items()}
        for tensor in self.engine.live()[0].values():
            tensor.zero_()
        self.engine.load(full_tensors(self.policy))
        self.engine.accept(self.policy.updates)
        return all(torch.equal(tensor, written[name]) for name, tensor in self.engine.live()[0].items())

    def mismatches_of_a_planted_error(self, weight_sync) -> list[str]:
        """One value and one key row of the last rank change places after a faultless transfer."""
        from oreal_megatron.runtime import distributed

        weight_sync.send(self.policy.updates)
        qkv = self.engine.live()[0]["model.layers.1.self_attn.qkv_proj.weight"]
        if distributed.rank() == distributed.world_size() - 1:
            qkv[[-1, -1 - self.policy.arch.head_dim]] = qkv[[-1 - self.policy.arch.head_dim, -1]]
        return [found.name for found in weight_sync.engine_checksum.mismatches()]

    def reset_refused_while_a_request_runs(self, weight_sync) -> str:
        from oreal_megatron.rollout.engine import EngineError

        core = self.engine.llm.llm_engine
        parameters = self.engine._sampling_params(self.config.sampling, (0, 0), self.grow_by_5()[0], 0)
        core.add_request("left over", {"prompt_token_ids": list(self.prompts[0].tokens)}, parameters)
        core.step()
        self.engine.version = 0
        try:
            weight_sync.sync(1)
        except EngineError as refusal:
            return str(refusal)
        return ""


@pytest.mark.parametrize(
    ("folder", "world", "layout", "packed"),
    [
        ("model_folder", 2, (2, 2, 1), False),
        ("tied_model_folder", 2, (1, 1, 2), False),
        ("model_folder", 1, (1, 1, 1), True),
    ],
    ids=["tensor 2, engine 2", "tied, pipeline 2, two engines", "an engine with packed weights"],
)
def test_engine_and_trainer_are_the_same_policy(folder, world, layout, packed, in_processes, make_samples, request):
    ranks = in_processes(world, story, str(request.getfixturevalue(folder)), *layout, packed, make_samples(8, seed=4))
    for number, result in enumerate(ranks):
        assert result["nothing to do"] == {}
        assert result["before"] < 1e-5 and result["after"] < 1e-4, result  # a step this large makes large logits
        assert max(result["oracle"]) < 1e-5, result["oracle"]
        assert result["rounds"] and result["carried"]["check"] < 1e-4, result["carried"]
        assert result["carried"]["versions"] == {(0, 1)}
        assert "not sampled from policy version 1" in result["carried"]["beyond"]
        assert "differ by" in result["carried"]["forgotten"], "tokens of version 0 have other log-probs"
        assert "differ by" in result["at temperature 1"]
        assert "version 0, the trainer is at 1" in result["missed"]
        assert "differ by" in result["stale"] and "differ by" in result["swapped"]
        assert "refused to reset its prefix cache" in result["refused"]
        assert result["version"] == 1
        assert result["first"] == result["again"] != result["other"], "answers are a function of seed and step"
        held = 0 if packed else 4
        assert result["woken"] == [
            "sleep 2",
            ("wake", "weights", "0 buffers", "gone: True"),
            ("wake", "kv_cache", f"{held} buffers", "gone: True"),
            "reset",
        ]
        assert ("loader" in result["says"] and "packed copy" in result["says"]) == packed
        assert result["metrics"]["weight_sync/direct"] == (not packed), "a packed engine is given full tensors"
        if packed:
            assert result["metrics"]["weight_sync/verified_tensors"] > 20
        else:
            assert result["as vLLM loads"] and result["metrics"]["weight_sync/verified_parameters"] > 20
            assert result["planted"] == ["model.layers.1.self_attn.qkv_proj.weight"] * number
    answers, known = ranks[0]["first"], ranks[-1]["first"]
    assert list(map(len, answers)) == list(map(len, known)), "all ranks know the length of all rollouts"
    local = [number for number, tokens in enumerate(known) if is_local(tokens)]
    assert len(local) == len(known) // (world // layout[0]), "and the tokens of those of their replica"
    assert all(known[number] == answers[number] for number in local) and all(map(is_local, answers))
    streams = [result["own"] for result in ranks]
    if layout[0] == world:  # one replica: the same tokens in the same order on each of its ranks
        assert len(streams[0]) == 6 and all(stream == streams[0] for stream in streams)
    else:  # every replica has some rollouts of every prompt, and one rollout alone leaves the other replica idle
        assert [sorted({slot for slot, *_ in stream}) for stream in streams] == [[0, 1, 2]] * 2
        assert ranks[0]["one"] == [answer for answer in streams[0] if answer[:2] == (0, 0)] and not ranks[1]["one"]


def test_shared_memory_loses_its_name_once_it_is_open(monkeypatch, tmp_path):
    """A killed job leaves none behind; that of other jobs stays."""
    from vllm.distributed.device_communicators import cpu_communicator

    from oreal_megatron.rollout import vllm_patches

    shared = cpu_communicator._CPUSHMDistributed
    own, other = tmp_path / "job-tp:0-[0-1]-cpushm_0", tmp_path / "another-tp:0-[0-1]-cpushm_0"
    other.touch()
    monkeypatch.setattr(shared, "_init_cpu_shm", lambda self: own.touch() or 7)
    vllm_patches.unlink_shared_memory(tmp_path)
    communicator = object.__new__(shared)
    communicator.group_name = "/job-tp:0-[0-1]-cpushm"
    assert communicator._init_cpu_shm() == 7 and list(tmp_path.iterdir()) == [other]


def test_on_a_gpu_the_engine_starts_beside_other_users_of_it(monkeypatch):
    import torch
    from vllm.engine.arg_utils import EngineArgs

    from oreal_megatron.config import Config
    from oreal_megatron.rollout import engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (name,) = arguments = engine._platform_arguments(Config())
    share = EngineArgs(model="", **arguments).gpu_memory_utilization  # vLLM refuses to start with less of the card free
    assert name == "gpu_memory_utilization" and share <= 0.05
