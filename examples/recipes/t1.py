"""T1's reinforcement learning (arXiv 2501.11651) at the paper's three sizes; a small one is in t1_checked.py.

Sources, named beside each block: [paper] is the paper, as far as it gives a number, [ours] is chosen by this project,
for GPUs of 80 GB. T1 starts from models fine-tuned on chains with trial and error, which this project does not have:

    models/T1-SFT-9B, models/T1-SFT-14B, models/T1-SFT-32B    OREAL_MODELS names another folder
    data/hard_prompts.jsonl (question, gold_answer, pass_rate; `oreal data filter`), data/held_out.jsonl
                                                              OREAL_DATA names another folder
    OREAL_RUNS (default: runs)

[paper] 9B is GLM-4-9B, a layout that this project does not read; [ours] the shapes of Yi-1.5-9B, of the Llama layout.
"""

import os

from oreal_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PenaltyConfig,
    ReferenceConfig,
    RewardModelConfig,
    SamplingConfig,
    SelectionConfig,
    VerifyConfig,
)

# [paper] rewards 1, 0 and -1 (penalised). Ours are 1, -1 and -3: twice as far apart, so the loss's sides get half.
PENALTIES = PenaltyConfig(repetition=True, overlong=True, gibberish=True, reward=-3.0)
SELECTION = SelectionConfig(advantage="leave_one_out", keep="all", penalties=PENALTIES)
# [paper] KL coefficient 2e-4, in the reward, for rewards 1 and 0. [ours] entropy coefficient: the paper gives none; the
# mean over tokens, with all samples over one denominator.
LOSS = LossConfig(
    positive_coef=0.5, negative_coef=0.5, normalise="joint", kl_coef=0.0, reward_kl_coef=4e-4, entropy_coef=1e-3
)
# [paper] a moving average; [ours] its rate: half of the reference is newer than 69 updates.
REFERENCE = ReferenceConfig(decay=0.99, every=1)


def t1_9b() -> Config:
    """T1's 9B size on 16 GPUs."""
    return _t1("T1-SFT-9B", gpus=16, parallel=ParallelConfig(tensor=4, sequence=True), engine_tensor=2, longest=10240)


def t1_14b() -> Config:
    """T1's 14B size on 32 GPUs."""
    return _t1("T1-SFT-14B", gpus=32, parallel=ParallelConfig(tensor=4, sequence=True), engine_tensor=4, longest=10240)


def t1_32b() -> Config:
    """T1's 32B size on 64 GPUs."""
    layout = ParallelConfig(tensor=8, pipeline=2, sequence=True)
    return _t1("T1-SFT-32B", gpus=64, parallel=layout, engine_tensor=8, longest=16384)


def _t1(model: str, gpus: int, parallel: ParallelConfig, engine_tensor: int, longest: int) -> Config:
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return Config(
        run=os.path.join(os.environ.get("OREAL_RUNS", "runs"), model.lower().replace("-sft-", "_")),
        gpus=gpus,
        steps=200,  # [ours]
        policy_freeze_steps=0,
        tokens_per_micro_batch=16384,  # [ours]
        offload=True,
        model=ModelConfig(os.path.join(os.environ.get("OREAL_MODELS", "models"), model), dtype="bfloat16"),
        parallel=parallel,
        # [ours] all responses of a step at once where the cache allows it.
        engine=EngineConfig(
            tensor=engine_tensor,
            max_model_len=longest,
            max_num_seqs=32 * 64 // (gpus // engine_tensor),
            kv_cache_gib=40.0,
        ),
        # [paper] 64 responses per prompt at temperature 1.2, the best of 0.9 to 1.3 and min-p; longest sequences 10,240
        # and 16,384 tokens, of which [ours] 2,048 are the prompt's.
        sampling=SamplingConfig(rollouts_per_prompt=64, temperature=1.2, top_p=1.0, max_new_tokens=longest - 2048),
        data=DataConfig(
            path=_data("hard_prompts.jsonl"),
            held_out=_data("held_out.jsonl"),
            prompts_per_step=32,  # [paper]
            buckets=((0.0, 0.31, 1),),  # [paper] accuracy of 16 samples at most 0.3
            filter_overlong=True,
            drop_unreadable_golds=True,
        ),
        verify=VerifyConfig(workers=8),
        selection=SELECTION,
        loss=LOSS,
        reference=REFERENCE,
        optimizer=OptimizerConfig(lr=1.5e-6, min_lr=3e-7, warmup_steps=10),  # [paper] 1.5e-6; [ours] the schedule
        reward_model=RewardModelConfig(enabled=False),
        checkpoint=CheckpointConfig(every=20, keep=2),
        evaluation=EvaluationConfig(every=20, max_new_tokens=longest - 2048),
        megatron=recompute,
    )


def _data(name: str) -> str:
    return os.path.join(os.environ.get("OREAL_DATA", "data"), name)
