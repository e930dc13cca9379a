"""The paper's runs (arXiv 2502.06781), each at the authors' number of GPUs and at the smallest sensible one.

Sources, named beside each block: [paper] is the paper, [code] the authors' released configuration files
(InternLM/OREAL, oreal/configs, one for each run here), [ours] is chosen by this project, for GPUs of 80 GB.
Inputs, by default below the folder that the command is started in:

    models/OREAL-7B-SFT, models/OREAL-32B-SFT, models/DeepSeek-R1-Distill-Qwen-7B    OREAL_MODELS names another folder
    data/oreal_prompts.jsonl (question, gold_answer, pass_rate), data/held_out.jsonl  OREAL_DATA names another folder
    OREAL_JUDGE_URLS=http://HOST:PORT,... (none: verification by rules only)
    OREAL_JUDGE_MODEL (default: the model that the servers offer)
    OREAL_RUNS (default: runs)
"""

import dataclasses
import os

from oreal_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    JudgeConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardModelConfig,
    RolloutConfig,
    SamplingConfig,
    SelectionConfig,
    VerifyConfig,
    WeightsConfig,
)

# [paper] Fig. A4 sends a long system prompt about the habits of a good solver, the box and the length; in our words.
SYSTEM_PROMPT = r"""You are a mathematician who has trained for competitions and distrusts quick answers.

Before solving, say what is asked, what is given and which conditions are easy to overlook.
Think of several ways, say why the one you choose should work, and try another when it does not.
Justify every step. Cut a hard problem into parts, and look at small and extreme cases.
At the end go back over the conditions, and check the result by a second way where there is one.

Answer in the language of the question. Close with the final answer inside \boxed{}, without its unit.
You may use up to 8192 tokens, so take the room that the problem needs."""

RESPONSES_PER_STEP = 64 * 16  # [paper] questions x responses; [code] gen_global_batch 1024, prompt_repeat_k 16


def oreal_7b() -> Config:
    """OREAL-7B from OREAL-7B-SFT on 32 GPUs ([code]: 90 steps in 9 hours on 32 A100)."""
    return _oreal("oreal_7b", "OREAL-7B-SFT", gpus=32, parallel=_layout_7b(), engine_tensor=4, megatron={})


def oreal_7b_8_gpus() -> Config:
    """OREAL-7B on one node: the same step, with four times as many responses and micro-batches per GPU."""
    return _oreal("oreal_7b", "OREAL-7B-SFT", gpus=8, parallel=_layout_7b(), engine_tensor=4, megatron={})


def oreal_7b_without_reward_model() -> Config:
    """OREAL-7B with a weight of 1 for every token, on 32 GPUs."""
    return _without_reward_model(oreal_7b())


def oreal_7b_without_reward_model_8_gpus() -> Config:
    """OREAL-7B with a weight of 1 for every token, on one node."""
    return _without_reward_model(oreal_7b_8_gpus())


def oreal_dsr1_distill_qwen_7b() -> Config:
    """OREAL-DSR1-Distill-Qwen-7B from DeepSeek-R1-Distill-Qwen-7B on 32 GPUs."""
    return _distilled(gpus=32)


def oreal_dsr1_distill_qwen_7b_8_gpus() -> Config:
    """OREAL-DSR1-Distill-Qwen-7B on one node."""
    return _distilled(gpus=8)


def oreal_32b() -> Config:
    """OREAL-32B from OREAL-32B-SFT on 128 GPUs ([code])."""
    return _oreal("oreal_32b", "OREAL-32B-SFT", gpus=128, parallel=_layout_32b(), engine_tensor=8, megatron=RECOMPUTE)


def oreal_32b_32_gpus() -> Config:
    """OREAL-32B on four nodes; on two, the optimizer states of one model would take 25 GB of each GPU."""
    return _oreal("oreal_32b", "OREAL-32B-SFT", gpus=32, parallel=_layout_32b(), engine_tensor=8, megatron=RECOMPUTE)


def _layout_7b() -> ParallelConfig:
    """[code] tp_size 4. A replica stays within its node. [ours] without recomputation, for which there is room."""
    return ParallelConfig(tensor=4, sequence=True)


def _layout_32b() -> ParallelConfig:
    """[code] tp_size 8. [ours] two pipeline stages: policy and engine share a GPU while the run starts."""
    return ParallelConfig(tensor=8, pipeline=2, sequence=True)


# [code] selective_recompute 1.0: every layer is recomputed in the backward pass.
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _oreal(
    name: str, model: str, gpus: int, parallel: ParallelConfig, engine_tensor: int, megatron: dict[str, object]
) -> Config:
    return Config(
        run=os.path.join(os.environ.get("OREAL_RUNS", "runs"), name),
        gpus=gpus,
        # [code] seed 0, total_steps 90, actor_freeze_steps 10, in which the policy's schedule runs on, so that its
        # warm-up is over at its first update; [paper] 10 steps of the reward model alone, then 80.
        seed=0,
        steps=90,
        policy_freeze_steps=10,
        policy_schedule="steps",
        # [ours] one sequence of full length fills a micro-batch; idle models wait in host memory.
        tokens_per_micro_batch=16384,
        offload=True,
        # [code] dtype auto: that of the model's files.
        model=ModelConfig(os.path.join(os.environ.get("OREAL_MODELS", "models"), model), dtype="bfloat16"),
        parallel=parallel,
        engine=EngineConfig(
            tensor=engine_tensor,
            max_model_len=16384,  # [paper] maximum length; [code] gen_max_length
            # [ours] few replicas of many GPUs, all responses of a step at once: the longest response alone decides how
            # long a step generates, and its weights are read by several GPUs. `oreal plan --search` prefers it. The
            # key-value cache of the longest response takes 0.23 GB with 7B and 0.54 GB with 32B on each GPU.
            max_num_seqs=RESPONSES_PER_STEP // (gpus // engine_tensor),
            kv_cache_gib=48.0,
        ),
        # [paper] 16 responses per question; [code] temperature 1.0, gen_top_p 0.9, gen_top_k 0, gen_max_new 14000.
        sampling=SamplingConfig(rollouts_per_prompt=16, temperature=1.0, top_p=0.9, max_new_tokens=14000),
        # [paper], [code] synchronous: every response is finished in its step, by the policy that is trained. [ours]
        # off as there, though the longest responses take most of a step: partial rollouts would train 1.2 to 1.4 times
        # as many tokens per second by `oreal plan --rollouts`, but no run has shown yet that learning is unharmed.
        # RolloutConfig(round_tokens=512, pool=1.5) with LossConfig(ratio_cap=2.0, ratio_tokens="carried") turns it on.
        rollout=RolloutConfig(round_tokens=0),
        data=DataConfig(
            path=_data("oreal_prompts.jsonl"),
            held_out=_data("held_out.jsonl"),
            prompts_per_step=64,  # [paper]
            # The SFT models were tuned with the authors' system prompt. If a folder's chat template contains it, use
            # --set data.system_prompt= (an empty value), which keeps that one.
            system_prompt=SYSTEM_PROMPT,
            drop_unreadable_golds=True,  # [ours] nothing is learned from a gold answer that the verifier cannot read
            # [paper] pass rates 0 to 0.8; [code] data_difficulty_balance_cfg.
            buckets=((0.0, 0.2, 6), (0.2, 0.4, 4), (0.4, 0.6, 4), (0.6, 0.8, 2)),
        ),
        verify=VerifyConfig(
            workers=8,  # [ours] of each engine, for all of its responses
            thinking_end=("<conclude>", "**Final Answer**", "</think>"),  # [code] thinking_finish_words
            judge=_judge(),
        ),
        # [paper] one correct and one incorrect response per question, leave-one-out; [code] filter_trajectory, rloo.
        selection=SelectionConfig(advantage="leave_one_out", keep="pair"),
        # [paper] Eq. 10; [code] threshold_rescale, correct_threshold and incorrect_threshold 0.5, and the mean of the
        # scores up to a token in place of its own score.
        weights=WeightsConfig(
            belief="prefix_mean", rescale="threshold", threshold_correct=0.5, threshold_incorrect=0.5
        ),
        # [paper] KL 0.01; [code] positive_loss_factor, negative_loss_factor, kl_coef, pos_mult_adv.
        loss=LossConfig(positive_coef=1.0, negative_coef=0.5, kl_coef=0.01, kl_kind="k3", advantage_on_positives=True),
        # [paper] 5e-7 and 2e-6, cosine to a fifth; [code] actor_lr, token_level_rm_lr, their minima, warmup_steps, wd,
        # max_grad_norm.
        optimizer=OptimizerConfig(lr=5e-7, min_lr=1e-7, warmup_steps=10, weight_decay=0.01, clip_grad=1.0),
        # [paper] w(s_<=t): a token is scored after reading it; [code] before it. [code] the scalar head starts at zero:
        # the loader fills it so, because the policy's lm_head has another shape.
        reward_model=RewardModelConfig(
            score_at="token",
            head_init="zeros",
            optimizer=OptimizerConfig(lr=2e-6, min_lr=4e-7, warmup_steps=10, weight_decay=0.01, clip_grad=1.0),
        ),
        # [paper] evaluation every 10 steps, best checkpoint; [code] checkpoint_interval 10. [ours] two are kept: a
        # checkpoint with reward model and both optimizers takes 210 GB for 7B and 920 GB for 32B.
        checkpoint=CheckpointConfig(every=10, keep=2),
        evaluation=EvaluationConfig(every=10, max_new_tokens=14000),
        megatron=megatron,
    )


def _distilled(gpus: int) -> Config:
    name, model = "oreal_dsr1_distill_qwen_7b", "DeepSeek-R1-Distill-Qwen-7B"
    config = _oreal(name, model, gpus, _layout_7b(), engine_tensor=4, megatron={})
    # [code] no system prompt, neither in the chat template nor here.
    return dataclasses.replace(config, data=dataclasses.replace(config.data, system_prompt=""))


def _without_reward_model(config: Config) -> Config:
    """[code] token_level_rm None, filter_trajectory False (responses of all prompts), actor_freeze_steps 0."""
    return dataclasses.replace(
        config,
        run=config.run + "_without_reward_model",
        policy_freeze_steps=0,
        reward_model=RewardModelConfig(enabled=False),
        selection=SelectionConfig(advantage="leave_one_out", keep="all"),
    )


def _data(name: str) -> str:
    return os.path.join(os.environ.get("OREAL_DATA", "data"), name)


def _judge() -> JudgeConfig:
    """[paper] Qwen2.5-72B-Instruct, called for responses that the rules find incorrect."""
    urls = os.environ.get("OREAL_JUDGE_URLS", "")
    return JudgeConfig(
        urls=tuple(url.strip() for url in urls.split(",") if url.strip()) if urls != "none" else (),
        required=urls != "none",
        model=os.environ.get("OREAL_JUDGE_MODEL", ""),
        concurrency=32,  # [ours] per engine: the 8 engines of 32 GPUs send at most 256 requests at once
    )
