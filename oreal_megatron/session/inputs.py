"""Read and check what a run starts from: recipe, model folder, tokenizer, problems. Needs no GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from oreal_megatron.config import Config, ConfigError, require_judge, user_functions, validate
from oreal_megatron.config.schema import FunctionKey, ObserverKey, config_keys
from oreal_megatron.convert import to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.data import chat_template, lines, problems
from oreal_megatron.data import user_functions as data_functions
from oreal_megatron.math_equality import rules
from oreal_megatron.models import architecture
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import files, versions
from oreal_megatron.session import model_checks
from oreal_megatron.verify import judge

# Settings that name a function on which the training depends.
FIXED_FUNCTIONS = tuple(
    key.path
    for key in config_keys(Config())
    if isinstance(key.key, FunctionKey) and not isinstance(key.key, ObserverKey)
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Input of a run that passed all checks: configuration, model folder, tokenizer."""

    config: Config
    folder: HFFolder
    arch: architecture.Architecture
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: list[int]
    reward_folder: HFFolder | None = None  # of `reward_model.path`

    @property
    def template(self) -> data_functions.Template | None:
        """Function of `data.template` that renders prompts; None: the tokenizer's chat template."""
        return data_functions.template(self.config.data.template)

    def reader(self, path: str) -> data_functions.Reader | None:
        """Return the function of `data.reader` for the recipe's own problems; None for other files."""
        data = self.config.data
        return data_functions.reader(data.reader) if path in (data.path, data.held_out) else None

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt that leaves room for the shortest boxed answer."""
        return self.config.engine.max_model_len - chat_template.shortest_response(self.tokenizer)

    def prompts(self, path: str) -> list[Prompt]:
        """Return the problems of a data file that can be trained on.

        Raises ConfigError for prompts without room for an answer and for gold answers that the verifier cannot read,
        unless the recipe leaves them out.
        """
        data = self.config.data
        fitting = problems.check_lengths(self.rendered(path), path, self.max_prompt_tokens, data.filter_overlong)
        if self.config.verify.function:  # gold answers are what it takes them for
            return fitting
        return problems.check_golds(fitting, path, rules.equals_itself, data.drop_unreadable_golds)

    def rendered(self, path: str) -> list[Prompt]:
        """Return the problems of a data file without checking their lengths and gold answers."""
        data, with_rows = self.config.data, bool(self.config.verify.function)
        functions = self.reader(path), self.template
        return problems.load_prompts(path, self.tokenizer, data.system_prompt, data.keys, with_rows, *functions)

    def training_prompts(self) -> list[Prompt]:
        """Return the problems to train on, with a check of the room for their responses."""
        prompts = self.prompts(self.config.data.path)
        model_checks.check_response_room(self.config, prompts, "sampling")
        return prompts

    def fingerprints(self, prompts: Sequence[Prompt] = ()) -> dict[str, str]:
        """Return digests of what a resumed run must find unchanged, by the key of the configuration that names it.

        `prompts`: of the run; their tokens depend on tokenizer and chat template too. "" is the digest of no file.
        """
        config = self.config
        paths = {"data.path": config.data.path, "data.held_out": config.data.held_out}
        digests = {name: _digest_problems(path, self.reader(path)) for name, path in paths.items()}
        digests |= {path: "" for path in FIXED_FUNCTIONS} | {
            path: source.digest for path, source in user_functions.sources(config).items() if path in FIXED_FUNCTIONS
        }
        rendered = json.dumps([self.stop_tokens, *(prompt.tokens for prompt in prompts)])
        digest = hashlib.blake2b(rendered.encode(), digest_size=16).hexdigest()
        tokens = {"tokens of the prompts": digest} if prompts else {}
        reward = self.reward_folder.fingerprint() if self.reward_folder else ""
        return {"model.path": self.folder.fingerprint(), "reward_model.path": reward, **digests, **tokens}

    def held_out(self) -> list[Prompt]:
        """Return the problems to evaluate on; none if the recipe names no file."""
        if not self.config.data.held_out:
            return []
        prompts = self.prompts(self.config.data.held_out)[: self.config.evaluation.problems or None]
        model_checks.check_response_room(self.config, prompts, "evaluation")
        return prompts


def read_inputs(config: Config) -> Inputs:
    """Check configuration, model folder, tokenizer and number of processes. Raises ConfigError for the first fault."""
    versions.check(versions.MEGATRON)
    versions.check(versions.VLLM)
    validate(config)
    user_functions.check_functions(config)
    model_checks.check_trackers(config)
    require_judge(config)
    folder = HFFolder(config.model.path)
    arch = architecture.read(folder.config)
    if architecture.head(folder.config) != "lm":
        raise ConfigError(f"{config.model.path} is a reward model; model.path must name the starting policy")
    to_megatron.check_weights(folder, arch, "lm")
    reward_folder = None
    if config.reward_model.enabled and config.reward_model.path:
        reward_folder = HFFolder(config.reward_model.path, tokenizer=False)
        model_checks.check_reward_model(reward_folder, folder, arch)
    judge.check_settings(config.verify.judge)
    arch.check_layout(config.parallel.tensor, config.parallel.pipeline, config.parallel.virtual)
    arch.check_training(config.parallel.tensor, config.parallel.sequence)
    model_checks.check_world(config, arch)
    if config.engine.max_model_len > arch.max_positions:
        raise ConfigError(
            f"engine.max_model_len is {config.engine.max_model_len}, but the model was made for "
            f"{arch.max_positions} positions; lower it"
        )
    model_checks.check_kv_cache(config, arch)
    tokenizer = problems.load_tokenizer(config.model.path, config.model.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {config.model.path} has no end-of-sequence token; without one no response ends"
        )
    if len(tokenizer) > arch.vocab:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {arch.vocab}")
    if template := data_functions.template(config.data.template):
        chat_template.check_user_template(tokenizer, template, config.data.system_prompt)
    else:
        chat_template.check_template(tokenizer, config.model.path, config.data.system_prompt)
    stop_tokens = problems.stop_tokens(tokenizer, config.model.path, arch.vocab)
    return Inputs(config, folder, arch, tokenizer, stop_tokens, reward_folder)


def _digest_problems(path: str, reader: data_functions.Reader | None) -> str:
    """Return the digest of problems; "" for those that the present command does not read, so that they may be missing.

    What a function of the user reads need not be a file: its rows count.
    """
    if path and reader:
        try:
            rows = json.dumps([row for _, row in reader(path)], default=str)
        except ConfigError:
            return ""
        return hashlib.blake2b(rows.encode(), digest_size=16).hexdigest()
    present = path.startswith(lines.HUB) or Path(path).is_file()
    return files.digest([lines.local_file(path)]) if present else ""
