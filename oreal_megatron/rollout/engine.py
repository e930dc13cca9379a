"""The colocated vLLM engine: this process is one of its workers. The only package that imports vllm."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from vllm import LLM, SamplingParams
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform

from oreal_megatron.algo import logprob_parity
from oreal_megatron.config import Config, Preempted, RunStopped, SamplingConfig
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.rollout import engine_arguments, growth, pool_schedule, requests, speculation, vllm_patches
from oreal_megatron.rollout.device import EngineMemory, is_device_error
from oreal_megatron.runtime import distributed, heartbeat, versions

versions.check(versions.VLLM)

log = logging.getLogger(__name__)

# Of the GPU, without which vLLM refuses to start; by default 0.92. The size of the KV cache does not depend on it, as
# engine.kv_cache_gib gives it, and the trainer or another process may have the rest.
FREE_SHARE = 0.05
STOP_CHECK_STEPS = 32  # engine steps between two agreements of a replica's ranks whether to stop, each a collective


class EngineError(RunStopped):
    """The engine does not complete its requests, or cannot be trusted to hold the weights it was given."""


class VllmEngine:
    """Engine of replicas of `engine.tensor` consecutive ranks, each generating its share of every prompt's rollouts.

    Implements protocols.RolloutEngine and protocols.WeightReceiver. All ranks of a replica make the same calls in the
    same order, and every request carries its own seed: vLLM's scheduler runs on each of them, and without seeds their
    token streams would silently diverge.
    """

    def __init__(
        self,
        config: Config,
        stop_tokens: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.config, self.stop_tokens, self.tokenizer = config, list(stop_tokens), tokenizer
        size = config.engine.tensor
        self.replica, self.replicas = distributed.rank() // size, distributed.world_size() // size
        self.reports = distributed.rank() % size == 0  # one rank of each replica reports its rollouts
        self.version, self.stop_requested, self.stopping = 0, stop_requested, False
        self.temperature = config.sampling.temperature
        can_sleep = config.engine.sleep and current_platform.is_sleep_mode_available()
        vllm_patches.register_internlm()
        if config.engine.transport == "direct":
            vllm_patches.keep_plain_weights()
        vllm_patches.unlink_shared_memory()
        vllm_patches.name_shared_memory(distributed.all_gather_object(uuid.uuid4().hex)[0])
        self.sockets = tempfile.TemporaryDirectory(prefix="oreal")  # vLLM leaves its sockets behind
        os.environ["VLLM_RPC_BASE_PATH"] = self.sockets.name
        engine_arguments.check_names(config.engine.vllm)
        speculation.prepare(config.engine.speculative)
        with engine_arguments.reported_refusals(config.engine.vllm):
            self.llm = LLM(
                config.model.path,
                dtype=config.engine_dtype,
                enable_sleep_mode=can_sleep,
                skip_tokenizer_init=True,
                tensor_parallel_size=size,
                distributed_executor_backend="external_launcher",
                seed=config.seed,
                max_model_len=config.engine.max_model_len,
                max_num_seqs=config.engine.max_num_seqs,
                kv_cache_memory_bytes=int(config.engine.kv_cache_gib * 2**30),
                enforce_eager=config.engine.enforce_eager,
                logprobs_mode="raw_logprobs",  # of all tokens: processed ones are of those within top_p
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **_platform_arguments(config) | _speculative_arguments(config) | config.engine.vllm,
            )
        vllm_patches.divide_logits(self.llm.collective_rpc("get_model")[0], self.temperature)
        self.drafts = speculation.install(self.llm) if config.engine.speculative.enabled else None
        self.memory = EngineMemory(self.llm, can_sleep)

    @property
    def awake(self) -> bool:
        """True while weights and KV cache are allocated."""
        return self.memory.awake

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: tuple[int, int],
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[list[Rollout]]:
        """Return the [P, K] rollouts of all prompts on every rank. Collective. Values and errors: see `extend`."""
        per_prompt = sampling.rollouts_per_prompt
        grown = self.extend(growth.blank_rollouts(prompts, per_prompt), sampling, seed, on_rollout)
        return [grown[start : start + per_prompt] for start in range(0, len(grown), per_prompt)]

    def extend(
        self,
        rollouts: Sequence[Rollout],
        sampling: SamplingConfig,
        seed: tuple[int, int],
        on_rollout: Callable[[Rollout], None] | None = None,
        round_tokens: int = 0,
    ) -> list[Rollout]:
        """Return rollouts after they have grown by `round_tokens`, or to their end with 0, on every rank. Collective.

        Tokens, log-probs and text are on the ranks of the replica that generated them (runtime/remote_values.py).
        `on_rollout` receives each rollout as soon as it is complete, on one rank of the replica that generated it.
        Requests that an engine does not complete are repeated, with the same seeds, by all ranks of its replica. A rank
        that fails between two collectives of a replica's step leaves its peers in the second; the watchdog ends that.

        Raises EngineError, on all ranks, if the retries did not help, and Preempted if a rank was asked to stop.
        """
        by_key = {rollout.key: rollout for rollout in rollouts}
        missing = [rollout.key for rollout in rollouts if self.is_own(rollout)]
        finished: dict[tuple[int, int], Rollout] = {}
        for attempt in range(self.config.engine.retries + 1):
            pending = {f"{attempt}.{slot}.{index}": by_key[slot, index] for slot, index in missing}
            growing = self._run_requests(pending, sampling, seed, round_tokens)
            error, can_retry = self._collect(growing, round_tokens, on_rollout, finished)
            if any(distributed.all_gather_object(self.stopping)):
                raise Preempted("a stop was requested during generation")
            unfinished = [key for key in missing if key not in finished]
            gathered = distributed.all_gather_object((self.replica, unfinished, error))
            if not any(keys for _, keys, _ in gathered):
                break
            can_retry = all(distributed.all_gather_object(can_retry)) and attempt < self.config.engine.retries
            failures = [(len(keys), error_of_rank) for _, keys, error_of_rank in gathered]
            self._retry_or_stop(can_retry, attempt, failures, seed[1])
            missing = sorted({key for replica, keys, _ in gathered if replica == self.replica for key in keys})
        return growth.gather_growth(list(finished.values()), rollouts, self.version, self.replicas)

    def is_own(self, rollout: Rollout) -> bool:
        """Return whether this rank's replica generates a rollout."""
        return rollout.replica(self.replicas) == self.replica

    def _collect(
        self,
        rollouts: Iterator[Rollout],
        round_tokens: int,
        on_rollout: Callable[[Rollout], None] | None,
        finished: dict[tuple[int, int], Rollout],
    ) -> tuple[str, bool]:
        """Put what the engine yields into `finished`; return its error, "" without, and whether a retry can help."""
        try:
            for rollout in rollouts:
                is_new = rollout.key not in finished
                if on_rollout and self.reports and is_new and not self._grows(rollout, round_tokens):
                    on_rollout(rollout)
                finished[rollout.key] = rollout
        except Exception as raised:  # vLLM's, perhaps on this rank only; the others learn of it afterwards
            log.exception("the engine of rank %d failed", distributed.rank())
            return f"{type(raised).__name__}: {raised}".splitlines()[0], not is_device_error(raised)
        return "", True

    def _retry_or_stop(self, can_retry: bool, attempt: int, failures: list[tuple[int, str]], step: int) -> None:
        """Log the retry, or raise EngineError on all ranks alike. `failures`: unfinished requests and error by rank."""
        faults = "; ".join(
            f"rank {rank} is missing {count} responses ({error or 'vLLM returned none, or empty ones'})"
            for rank, (count, error) in enumerate(failures)
            if count
        )
        if not can_retry:
            stays = "" if attempt == self.config.engine.retries else "; an error of a GPU stays until its process ends"
            raise EngineError(
                f"step {step}: the engine did not complete all responses after {attempt} retries (engine.retries): "
                f"{faults}{stays}. Nothing was trained on this step; see the errors logged above, then resume the run"
            )
        if distributed.rank() == 0:
            log.warning("step %d: retrying unfinished requests: %s", step, faults)

    def _run_requests(
        self,
        pending: dict[str, Rollout],
        sampling: SamplingConfig,
        seed: tuple[int, int],
        round_tokens: int,
    ) -> Iterator[Rollout]:
        """Yield rollouts, given by request, as their requests finish; without those that vLLM aborted or left empty."""
        engine = self.llm.llm_engine
        try:
            for request_id, rollout in pending.items():
                parameters = self._sampling_params(sampling, seed, rollout, round_tokens)
                tokens = [*rollout.prompt.tokens, *rollout.tokens]
                engine.add_request(request_id, {"prompt_token_ids": tokens}, parameters)
            steps = itertools.count()
            while engine.has_unfinished_requests() and not self.stopping:
                for result in engine.step():
                    output = result.outputs[0]
                    if requests.is_complete(output):
                        rollout = requests.grow(pending[result.request_id], output, self.version)
                        yield rollout if self._grows(rollout, round_tokens) else self._decode(rollout)
                if next(steps) % STOP_CHECK_STEPS == 0:
                    self.stopping = self._replica_stop_requested()
                heartbeat.beat()
        finally:
            engine.abort_request(list(pending))  # without effect on finished requests

    def _grows(self, rollout: Rollout, round_tokens: int) -> bool:
        """Return whether a rollout grows further in a later round."""
        return round_tokens > 0 and pool_schedule.is_open(rollout, self.config)

    def _decode(self, rollout: Rollout) -> Rollout:
        """Return a rollout with its text."""
        return dataclasses.replace(rollout, text=self.tokenizer.decode(rollout.tokens, skip_special_tokens=True))

    def metrics(self) -> Metrics:
        """Return drafted tokens since the last call, and the share accepted if any, on all replicas. Collective."""
        if self.drafts is None:
            return {}
        counts = distributed.all_gather_object(self.drafts.take_counts() if self.reports else (0, 0))
        drafted, accepted = (sum(column) for column in zip(*counts, strict=True))
        share = {"rollout/draft_accepted_share": accepted / drafted} if drafted else {}
        return {"rollout/drafted_tokens": drafted, **share}

    def live(self) -> tuple[dict[str, Tensor], str]:
        """Return this rank's parameters by vLLM's names, and why they cannot be written directly ("" if they can)."""
        model = self.llm.collective_rpc("get_model")[0]
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return parameters, vllm_patches.packed_weight(model)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load full tensors under Hugging Face names through vLLM's own loader; `accept` must follow."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})

    def sleep(self) -> None:
        """Release weights and KV cache until `wake` and `accept`; no effect where the platform cannot (CPU)."""
        self.memory.release()

    def wake(self) -> None:
        """Allocate memory for weights, with undefined contents; the KV cache follows in `accept`."""
        self.memory.allocate_weights()

    def accept(self, version: int) -> None:
        """Mark the weights as those of a policy version: drop cached keys and values, allocate the KV cache."""
        self.memory.allocate_cache()
        if not all(distributed.all_gather_object(self.llm.reset_prefix_cache())):  # gathered: replicas stop together
            raise EngineError(
                f"vLLM refused to reset its prefix cache after weights of version {version} were loaded; it would use "
                "keys and values of the old policy. Check whether requests are still running"
            )
        self.version = version

    def close(self) -> None:
        """End the engine. vLLM destroys torch's process group with it, so this comes last."""
        self.llm.llm_engine.engine_core.shutdown()
        self.sockets.cleanup()

    def _replica_stop_requested(self) -> bool:
        """Check whether any rank of this replica was asked to stop: they step together, so they stop together."""
        if self.config.engine.tensor == 1:
            return bool(self.stop_requested())
        requested = torch.tensor([bool(self.stop_requested())], dtype=torch.int32)
        dist.all_reduce(requested, dist.ReduceOp.MAX, group=get_tp_group().cpu_group)
        return bool(requested)

    def _sampling_params(
        self,
        sampling: SamplingConfig,
        seed: tuple[int, int],
        rollout: Rollout,
        round_tokens: int,
    ) -> SamplingParams:
        """Return the parameters of one request; log-probs are for the parity check, or for importance ratios."""
        slot, index = rollout.key
        is_checked = logprob_parity.is_checked(slot, index, self.config.engine, self.replicas)
        with_logprobs = is_checked or self.config.loss.ratio_cap > 0 or round_tokens > 0
        seed_of_request = requests.request_seed(*seed, slot, index, len(rollout.tokens))
        temperature = sampling.temperature / self.temperature  # the model's logits are divided already
        room = sampling.max_new_tokens - len(rollout.tokens)
        return requests.sampling_params(
            sampling,
            temperature,
            self.stop_tokens,
            seed_of_request,
            with_logprobs,
            min(round_tokens or room, room),
        )


def _speculative_arguments(config: Config) -> dict[str, Any]:
    """Return vLLM's arguments of drafting. Sampling waits for the drafts' verdict, so nothing is scheduled ahead."""
    speculative = config.engine.speculative
    return {"speculative_config": speculative.arguments(), "async_scheduling": False} if speculative.enabled else {}


def _platform_arguments(config: Config) -> dict[str, Any]:
    """Return arguments for GPUs that others use too, and for CPUs.

    On CPUs vLLM 0.31 fails on a seeded request whose prompt is chunked: "CPU Generator does not use offset".
    """
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": FREE_SHARE}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, config.engine.max_model_len)}
