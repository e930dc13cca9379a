"""`oreal sft RECIPE`: supervised fine-tuning on demonstrations, into RUN/policy."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from oreal_megatron import settings
from oreal_megatron.cli.train import save_policy
from oreal_megatron.config import ConfigError
from oreal_megatron.data import problems
from oreal_megatron.data.sampler import Sampler
from oreal_megatron.evaluation.score import evaluate
from oreal_megatron.observe.rows import append_row
from oreal_megatron.observe.run_folder import RunFolder, refuse_existing
from oreal_megatron.runtime import distributed, heartbeat, watchdog
from oreal_megatron.session import prepare
from oreal_megatron.training import supervised


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path/to/file.py:function, a function that returns a Config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. supervised.steps=500")


def run(args: argparse.Namespace) -> int:
    config = settings.override(settings.from_recipe(args.recipe), args.set)
    inputs = prepare.prepare(config)
    wanted = config.supervised
    demonstrations = problems.load_demonstrations(
        wanted.path, inputs.tokenizer, config.data.system_prompt, inputs.arch.max_positions
    )
    held_out = inputs.held_out() if wanted.evaluate_every else []
    if wanted.evaluate_every and not held_out:
        raise ConfigError("supervised.evaluate_every is set, but data.held_out names no problems to evaluate on")
    refuse_existing(config)

    from oreal_megatron.mcore import gpt_model, parallel, trained_models

    gpt_model.transformer_config(inputs.arch, config)
    parallel.start_process_group(config.watchdog.collective_s)
    watchdog.start(config)
    engine, verifier = prepare.start_engine(inputs) if wanted.evaluate_every else (None, None)
    if engine:
        engine.sleep()
    parallel.start_megatron(config.parallel, config.seed, config.watchdog.collective_s)
    policy = trained_models.Policy(
        inputs.arch, dataclasses.replace(config, optimizer=wanted.optimizer), inputs.folder.tensor
    )

    weight_sync = prepare.connect(policy, engine) if engine else None

    def accuracy() -> float:
        weight_sync.sync(policy.updates)
        found = evaluate(held_out, engine, verifier, config)
        engine.sleep()
        return found["accuracy"]

    shown = distributed.rank() == 0
    if shown:
        RunFolder(config).write_header(inputs.fingerprints())
    sampler = Sampler(demonstrations, wanted.samples_per_step, config.seed)

    def log(step: int, metrics: dict[str, float]) -> None:
        if shown:
            append_row(Path(config.run) / "metrics.jsonl", {"step": step, **metrics})

    spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
    steps = supervised.imitate(config, sampler, policy, accuracy, log, shown, spec)
    with heartbeat.phase("checkpoint"):
        save_policy(inputs, policy, Path(config.run) / "policy")
    if shown:
        print(f"{steps} supervised steps done; the policy is in {config.run}/policy")
    if verifier:
        verifier.grader.close()
    with heartbeat.phase("stop"):
        parallel.stop(engine)
    return 0
