"""The colocated vLLM engine: this process is one of its workers. The only room that imports vllm."""

from __future__ import annotations

import hashlib
import logging
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
from vllm.sampling_params import RequestOutputKind

from oreal_megatron.config import Config, Preempted, RunStopped, SamplingConfig
from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.rollout import internlm, plain_weights, shared_memory
from oreal_megatron.runtime import distributed, heartbeat, versions

versions.check(versions.VLLM)

log = logging.getLogger(__name__)
Finished = Callable[[Rollout], None]


class EngineError(RunStopped):
    """The engine does not answer, or cannot be trusted to hold the weights it was given."""


class VllmEngine:
    """Replicas of `engine.tensor` consecutive ranks, each generating for its share of the prompts.

    All ranks of a replica make the same calls in the same order, and every request carries its own seed: vLLM's
    scheduler runs on each of them, and without seeds their token streams part silently.
    """

    def __init__(
        self,
        config: Config,
        stop_tokens: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        leave: Callable[[], bool] = lambda: False,  # whether this process was asked to
    ):
        self.config, self.stop_tokens, self.tokenizer = config, list(stop_tokens), tokenizer
        size = config.engine.tensor
        self.replica, self.replicas = distributed.rank() // size, distributed.world_size() // size
        self.speaks = distributed.rank() % size == 0  # one rank of each replica reports its rollouts
        self.version, self.leave, self.leaving = 0, leave, False
        self.can_sleep = config.engine.sleep and current_platform.is_sleep_mode_available()
        self.awake = True
        internlm.register()
        if config.engine.transport == "direct":
            plain_weights.keep()
        shared_memory.of_this_job(distributed.all_gather_object(uuid.uuid4().hex)[0])
        self.llm = LLM(
            config.model.path,
            dtype=config.engine_dtype,
            enable_sleep_mode=self.can_sleep,
            skip_tokenizer_init=True,
            tensor_parallel_size=size,
            distributed_executor_backend="external_launcher",
            seed=config.seed,
            max_model_len=config.engine.max_model_len,
            max_num_seqs=config.engine.max_num_seqs,
            kv_cache_memory_bytes=int(config.engine.kv_cache_gib * 2**30),
            enforce_eager=config.engine.enforce_eager,
            logprobs_mode="raw_logprobs",  # of the model's own distribution: comparable whatever temperature and top_p
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **_platform_arguments(config),
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: tuple[int, int],
        finished: Finished | None = None,
    ) -> list[list[Rollout]]:
        """[P, K] answers to all prompts, on every rank. `finished` is called for each answer as soon as it is
        complete, on one rank of the replica that generated it.

        What an engine fails to answer is asked again, with the same seeds, by all ranks of its replica; EngineError on
        every rank when that did not help. A rank that fails between two collectives of a replica's step leaves its
        peers in the second: the watchdog ends that. Raises Preempted, on all ranks, when one was asked to leave.
        """
        slots = range(self.replica, len(prompts), self.replicas)
        missing = [(slot, index) for slot in slots for index in range(sampling.rollouts_per_prompt)]
        done: dict[tuple[int, int], Rollout] = {}
        for attempt in range(self.config.engine.retries + 1):
            asked = {f"{attempt}.{slot}.{index}": (prompts[slot], slot, index) for slot, index in missing}
            error = ""
            try:
                for rollout in self._answers(asked, sampling, seed):
                    if finished and self.speaks and rollout.key not in done:
                        finished(rollout)
                    done[rollout.key] = rollout
            except Exception as raised:  # of vLLM, on this rank alone perhaps: the others hear of it below
                log.exception("the engine of rank %d failed", distributed.rank())
                error = f"{type(raised).__name__}: {raised}".splitlines()[0]
            if any(distributed.all_gather_object(self.leaving)):
                raise Preempted("asked to leave while generating")
            gaps = distributed.all_gather_object((self.replica, [key for key in missing if key not in done], error))
            if not any(gap for _, gap, _ in gaps):
                break
            self._retry_or_stop(attempt, [(gap, error) for _, gap, error in gaps], seed[1])
            missing = sorted({key for replica, gap, _ in gaps if replica == self.replica for key in gap})
        return self._everyones(list(done.values()), prompts, sampling.rollouts_per_prompt)

    def _retry_or_stop(self, attempt: int, everyones: list[tuple[list, str]], step: int) -> None:
        """Say what is asked again, or raise on all ranks alike."""
        faults = "; ".join(
            f"rank {rank} lacks {len(gap)} answers ({error or 'vLLM returned none, or empty ones'})"
            for rank, (gap, error) in enumerate(everyones)
            if gap
        )
        retries = self.config.engine.retries
        if attempt == retries:
            raise EngineError(
                f"step {step}: the engine did not answer, {retries} retries (engine.retries) included: {faults}. "
                "Nothing was trained on this step; the errors are logged above, and the run can be resumed"
            )
        if distributed.rank() == 0:
            log.warning("step %d: the engine is asked again: %s", step, faults)

    def _answers(
        self, asked: dict[str, tuple[Prompt, int, int]], sampling: SamplingConfig, seed: tuple[int, int]
    ) -> Iterator[Rollout]:
        """The answers to named requests, as they are completed. Those that vLLM aborted or left empty are left out."""
        engine = self.llm.llm_engine
        try:
            for request, (prompt, slot, index) in asked.items():
                parameters = self._parameters(sampling, seed, slot, index)
                engine.add_request(request, {"prompt_token_ids": list(prompt.tokens)}, parameters)
            while engine.has_unfinished_requests() and not self.leaving:
                for output in engine.step():
                    answer = output.outputs[0]
                    if answer.token_ids and answer.finish_reason in ("stop", "length"):
                        yield self._rollout(*asked[output.request_id], answer)
                self.leaving = self._leaves()
                heartbeat.beat()
        finally:
            engine.abort_request(list(asked))  # nothing is left of them when all went well

    def live(self) -> tuple[dict[str, Tensor], str]:
        """This rank's parameters as they are, by vLLM's names; and why writing to them would not do, if so."""
        model = self.llm.collective_rpc("get_model")[0]
        return {name: parameter.detach() for name, parameter in model.named_parameters()}, plain_weights.refusal(model)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights (Hugging Face names, full tensors) through vLLM's own loader; `accept` must follow."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})

    def sleep(self) -> None:
        """Give up weights and cache until `wake` and `accept`; nothing where the platform cannot, as on a CPU."""
        if self.can_sleep and self.awake:
            self.llm.sleep(level=2)
            self.awake = False

    def wake(self) -> None:
        """Have room for weights again, with nothing in it that can be used; no cache yet."""
        if not self.awake:
            self.llm.wake_up(["weights"])

    def accept(self, version: int) -> None:
        """The weights are now those of a policy version: forget what was cached under the old ones, be ready."""
        if not self.awake:
            self.llm.wake_up(["kv_cache"])
            self.awake = True
        if not all(distributed.all_gather_object(self.llm.reset_prefix_cache())):  # gathered: replicas stop together
            raise EngineError(
                f"vLLM refused to reset its prefix cache after weights of version {version} were loaded; it would "
                "answer from keys and values of the old policy. Were requests still running?"
            )
        self.version = version

    def close(self) -> None:
        """End the engine. vLLM takes torch's process group down with it, so this comes last."""
        self.llm.llm_engine.engine_core.shutdown()

    def _leaves(self) -> bool:
        """Whether a rank of this replica was asked to leave: they step together, so they stop together."""
        if self.config.engine.tensor == 1:
            return bool(self.leave())
        asked = torch.tensor([bool(self.leave())], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=get_tp_group().cpu_group)
        return bool(asked)

    def _parameters(self, sampling: SamplingConfig, seed: tuple[int, int], slot: int, index: int) -> SamplingParams:
        proof = index == 0 and slot // self.replicas < self.config.engine.parity_rollouts
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=request_seed(*seed, slot, index),
            stop_token_ids=self.stop_tokens,
            logprobs=0 if proof else None,  # 0: of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, prompt: Prompt, slot: int, index: int, output: Any) -> Rollout:
        tokens = tuple(output.token_ids)
        logprobs = None
        if output.logprobs is not None:
            logprobs = tuple(step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True))
        return Rollout(
            prompt=prompt,
            slot=slot,
            index=index,
            tokens=tokens,
            text=self.tokenizer.decode(tokens, skip_special_tokens=True),
            finished=output.finish_reason == "stop",
            logprobs=logprobs,
            version=self.version,
        )

    def _everyones(self, mine: list[Rollout], prompts: Sequence[Prompt], answers: int) -> list[list[Rollout]]:
        """[P, K] from the replicas' parts; prompts are known everywhere and do not travel."""
        parts = [(r.slot, r.index, r.tokens, r.text, r.finished, r.logprobs, r.version) for r in mine if self.speaks]
        table: list[list[Any]] = [[None] * answers for _ in prompts]
        for slot, index, *rest in (part for share in distributed.all_gather_object(parts) for part in share):
            table[slot][index] = Rollout(prompts[slot], slot, index, *rest)
        return table


def _platform_arguments(config: Config) -> dict[str, Any]:
    """On CPU, vLLM 0.31 fails on a seeded request whose prompt is chunked ("CPU Generator does not use offset")."""
    if torch.cuda.is_available():
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, config.engine.max_model_len)}


def request_seed(run_seed: int, step: int, slot: int, index: int) -> int:
    """31-bit seed of one request; independent of which replica serves it."""
    digest = hashlib.blake2b(f"{run_seed} {step} {slot} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33
