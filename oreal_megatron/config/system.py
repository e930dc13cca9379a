"""Sections of the system: model, parallelism, engine, verification, checkpoints, watchdog."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from oreal_megatron.config.schema import FixedKey, FreeKey, FunctionKey, InputKey, Key, ObserverKey, Section
from oreal_megatron.config.speculative import DRAFT_MODELS, SpeculativeConfig


@dataclass(frozen=True)
class ModelConfig(Section):
    """The starting policy; reward model and reference are initialised from it as well."""

    path: Annotated[str, InputKey("Hugging Face folder of the starting policy")] = ""
    dtype: Annotated[Literal["float32", "bfloat16"], FixedKey("precision of the trained models")] = "float32"
    layers: Annotated[
        Literal["local", "transformer_engine"],
        Key("modules of Megatron and of this project, or the fused ones of Transformer Engine (must be installed)"),
    ] = "local"
    logits_mib: Annotated[int, Key("memory that the output layer may fill with logits", 1, 10**6, "MiB")] = 1280
    trust_remote_code: Annotated[bool, FreeKey("run the Python code that a tokenizer brings with it")] = False


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Megatron's parallel layout; the data-parallel size is the number of processes divided by the others."""

    tensor: Annotated[int, Key("tensor-parallel size", low=1)] = 1
    pipeline: Annotated[int, Key("pipeline-parallel size", low=1)] = 1
    virtual: Annotated[int, Key("interleaved chunks of layers per stage; above 1 needs pipeline above 1", low=1)] = 1
    context: Annotated[int, Key("context-parallel size: ranks that share each packed sequence", low=1)] = 1
    sequence: Annotated[bool, Key("sequence parallelism over the tensor-parallel ranks; needs tensor above 1")] = False
    overlap: Annotated[
        bool, Key("data-parallel ranks reduce gradients and gather weights while micro-batches compute")
    ] = False

    def bubble(self, micro_batches: int, fills: float = 1.0) -> float:
        """Return the ideal pipeline bubble: the share of a pass in which stages wait for each other.

        `fills`: how often the pipeline fills and drains in these micro-batches.
        """
        waiting = (self.pipeline - 1) * fills
        return waiting / (micro_batches * self.virtual + waiting)

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message if sequence parallelism has no ranks to share sequences among."""
        if self.sequence and self.tensor == 1:
            yield f"{path}sequence is set, which needs {path}tensor of at least 2; unset it or raise {path}tensor"


# Arguments of vLLM that weight sync, parity check and layout rest on, and the setting that gives each its value.
VLLM_ARGUMENTS = {
    "model": "model.path",
    "dtype": "engine.dtype",
    "enable_sleep_mode": "engine.sleep",
    "skip_tokenizer_init": "",
    "tensor_parallel_size": "engine.tensor",
    "distributed_executor_backend": "",
    "seed": "seed",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "enforce_eager": "engine.enforce_eager",
    "logprobs_mode": "",
    "speculative_config": "engine.speculative.method",
}


@dataclass(frozen=True)
class EngineConfig(Section):
    """The colocated vLLM engine: replicas of `tensor` consecutive ranks each."""

    tensor: Annotated[int, Key("tensor-parallel size of a replica", low=1)] = 1
    max_model_len: Annotated[int, Key("most tokens of a prompt with its response", low=2, unit="tokens")] = 16384
    max_num_seqs: Annotated[int, Key("responses that a replica generates at once", low=1)] = 256
    kv_cache_gib: Annotated[float, Key("GPU memory of the key-value cache on each rank", low=1e-4, unit="GiB")] = 1.0
    dtype: Annotated[
        Literal["", "float32", "bfloat16"], Key("precision of the engine's weights; empty: that of the model")
    ] = ""
    transport: Annotated[
        Literal["direct", "gather"],
        FreeKey("weight sync shard by shard, or by gathering full tensors that vLLM's own loader reads"),
    ] = "direct"
    buffer_mib: Annotated[int, FreeKey("memory of the direct transport on each rank", 1, 10**6, "MiB")] = 512
    sleep: Annotated[bool, FreeKey("free the engine's GPU memory while the trainer works (not on CPUs)")] = True
    enforce_eager: Annotated[bool, Key("run the engine without CUDA graphs and compilation")] = False
    batch_invariant: Annotated[
        bool, Key("log-probs that do not depend on the batch (vLLM's mode, slower; H100 or newer)")
    ] = False
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    vllm: Annotated[
        dict[str, Any], Key("further arguments of vLLM's engine, passed on as they are")
    ] = field(default_factory=dict)  # fmt: skip
    retries: Annotated[int, FreeKey("further attempts for responses that an engine failed to give", 0, 100)] = 1
    parity_rollouts: Annotated[int, FreeKey("rollouts per replica and step in the logprob parity check", low=1)] = 2
    parity_tokens: Annotated[int, FreeKey("first tokens of each that are compared", low=1, unit="tokens")] = 64
    parity_tolerance_nats: Annotated[
        float | None,
        FreeKey(
            "largest mean |difference| of a rollout's log-probs; None: 1e-4 in float32, 0.1 in bfloat16", 0.0, 100.0
        ),
    ] = None

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield messages about arguments of vLLM that have a setting of their own, and a draft model that sleeps."""
        for name in self.vllm.keys() & VLLM_ARGUMENTS.keys():
            setting = VLLM_ARGUMENTS[name]
            fix = f"set {setting} instead" if setting else "remove it: this project depends on its value"
            yield f"{path}vllm gives {name}, which is not free; {fix}"
        if self.sleep and self.speculative.method in DRAFT_MODELS:
            yield (
                f"{path}speculative.method is {self.speculative.method}, whose weights a sleeping engine loses: "
                f"weight sync restores only the policy's; set {path}sleep=false, or {path}speculative.method=ngram"
            )


@dataclass(frozen=True)
class JudgeConfig(Section):
    """LLM judge behind an OpenAI-compatible API, called for answers that the rules find incorrect."""

    urls: Annotated[tuple[str, ...], Key("servers, e.g. http://HOST:8000; empty: no judge")] = ()
    required: Annotated[bool, FreeKey("refuse to start if urls is empty")] = False
    model: Annotated[str, Key("model name in requests; empty: the one that the server offers")] = ""
    connect_timeout_s: Annotated[float, FreeKey("time to connect", 0.01, 3600.0, "s")] = 5.0
    read_timeout_s: Annotated[float, Key("time to wait for a verdict", 0.01, 86400.0, "s")] = 60.0
    retries: Annotated[int, Key("further attempts per request", 0, 100)] = 3
    concurrency: Annotated[int, FreeKey("requests in flight, all servers together", low=1)] = 64
    all_down_wait_s: Annotated[
        float, FreeKey("wait for a server when all are down, before the run stops", 0.0, 604800.0, "s")
    ] = 600.0
    max_answer_chars: Annotated[int, Key("longest extracted answer shown to the judge", low=1, unit="characters")] = 500
    cache: Annotated[str, FreeKey("file of verdicts that survives a restart; empty: in memory only")] = ""

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message for each server that is no URL."""
        for url in self.urls:
            if not re.match(r"https?://[^/\s]", url):
                yield f"{path}urls holds {url!r}; expected http://HOST:PORT or https://HOST"


@dataclass(frozen=True)
class VerifyConfig(Section):
    """Verification of responses."""

    workers: Annotated[int, FreeKey("verifier processes of each rank that holds rollouts", 1, 1024)] = 2
    timeout_s: Annotated[float, Key("time per response; the worker is killed after it", 0.01, 3600.0, "s")] = 2.0
    memory_mib: Annotated[int, Key("memory limit of a worker", 64, 10**6, "MiB")] = 1024
    thinking_end: Annotated[
        tuple[str, ...], Key("the answer is looked for after the last of these words")
    ] = ("</think>",)  # fmt: skip
    function: Annotated[
        str,
        FunctionKey(
            "function file.py:NAME or module:NAME of (row, response) in place of the rules: True, False, None, float",
            arguments=("row", "response"),
        ),
    ] = ""
    unknown_limit: Annotated[float, Key("share of unknown verdicts in a step above which the run stops", 0.0, 1.0)] = (
        0.2
    )
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message if both a function and a judge would decide, or if an empty word ends the thinking."""
        if not all(self.thinking_end):
            yield f"{path}thinking_end is {self.thinking_end}, with an empty word; () means that nothing is thinking"
        if self.function and self.judge.urls:
            yield (
                f"{path}function decides alone, but {path}judge.urls names a judge; unset one of them "
                "(a function may call a judge itself)"
            )


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Checkpoints during a run."""

    every: Annotated[int, FreeKey("steps between two checkpoints; 0: only at the end", low=0)] = 10
    keep: Annotated[int, FreeKey("newest checkpoints that are not deleted", low=1)] = 3
    keep_every: Annotated[int, FreeKey("checkpoints at multiples of this step stay as well; 0: none", low=0)] = 0


@dataclass(frozen=True)
class RecordConfig(Section):
    """Retention of what the run folder holds of every step."""

    dumps: Annotated[
        int, FreeKey("newest steps that can be replayed; those before the oldest checkpoint go earlier", low=1)
    ] = 100
    rollouts: Annotated[int, FreeKey("newest steps whose rollouts stay", low=1)] = 1000
    metric: Annotated[
        str,
        ObserverKey(
            "function file.py:NAME or module:NAME of (rollouts, verdicts) that returns metrics, logged as own/NAME",
            arguments=("rollouts", "verdicts"),
        ),
    ] = ""
    after_step: Annotated[
        str,
        ObserverKey(
            "function file.py:NAME or module:NAME of (step, metrics, run), called by the first rank after each step",
            arguments=("step", "metrics", "run"),
        ),
    ] = ""
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
        FreeKey("services that get the metrics too; each must be installed"),
    ] = ("tensorboard",)
    opentelemetry: Annotated[
        bool, FreeKey("send spans of steps and phases to the collector that the OTEL_EXPORTER_OTLP_* variables name")
    ] = False


@dataclass(frozen=True)
class WatchdogConfig(Section):
    """Time that a rank may spend in a phase without progress, before the job ends with exit code 5.

    Progress is an engine step, a micro-batch, a verified response or the begin of a phase. A rank that waits for others
    in a collective is not counted as long as one of them makes progress.
    """

    every_s: Annotated[float, FreeKey("time between two looks at all ranks; 0: no watchdog", 0.0, 3600.0, "s")] = 1.0
    silent_s: Annotated[
        float, FreeKey("without any report of a rank's process: it is stopped, or its host is gone", 0.0, unit="s")
    ] = 120.0
    start_s: Annotated[float, FreeKey("until the first step: loading, compiling", 0.0, unit="s")] = 3600.0
    generate_s: Annotated[float, FreeKey("generation", 0.0, unit="s")] = 600.0
    verify_s: Annotated[float, FreeKey("verification; longer than verify.judge.all_down_wait_s", 0.0, unit="s")] = (
        1800.0
    )
    reward_model_s: Annotated[float, FreeKey("update of the reward model", 0.0, unit="s")] = 1800.0
    reference_s: Annotated[float, FreeKey("scoring by the reference model", 0.0, unit="s")] = 1800.0
    policy_s: Annotated[float, FreeKey("update of the policy", 0.0, unit="s")] = 1800.0
    checkpoint_s: Annotated[float, FreeKey("writing a checkpoint", 0.0, unit="s")] = 3600.0
    other_s: Annotated[float, FreeKey("everything else", 0.0, unit="s")] = 1800.0
    collective_s: Annotated[
        float, FreeKey("time-out of the process groups, which know no phases: above all others", 1.0, unit="s")
    ] = 7200.0

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message for each limit that would end a healthy job, or that the process groups' time-out hides."""
        for name in (limit.name for limit in fields(self) if limit.name not in ("every_s", "collective_s")):
            value = getattr(self, name)
            if not 5 * self.every_s < value < self.collective_s:
                yield (
                    f"{path}{name} is {value:g}; expected more than 5 times {path}every_s ({self.every_s:g}) and less "
                    f"than {path}collective_s ({self.collective_s:g})"
                )
