"""The models of a run on this rank: policy, reference and token-level reward model."""

from __future__ import annotations

from typing import NamedTuple

from oreal_megatron.mcore.trained_models import NoRewardModel, Policy, Reference, TokenRewardModel
from oreal_megatron.mcore.trainer import MegatronTrainer
from oreal_megatron.session.inputs import Inputs


class Models(NamedTuple):
    """Models of a run, and those of them that are trained and saved, by their name in checkpoints."""

    policy: Policy
    reference: Reference
    reward_model: TokenRewardModel | NoRewardModel
    trainers: dict[str, MegatronTrainer]


def build_models(inputs: Inputs) -> Models:
    """Build this rank's stages of all models from the starting policy. Collective."""
    parts = (inputs.arch, inputs.config, inputs.folder.tensor)
    policy, reference = Policy(*parts), Reference(*parts)
    trainers: dict[str, MegatronTrainer] = {"policy": policy}
    if not inputs.config.reward_model.enabled:
        return Models(policy, reference, NoRewardModel(inputs.config), trainers)
    reward_model = build_reward_model(inputs)
    return Models(policy, reference, reward_model, trainers | {"reward_model": reward_model})


def build_reward_model(inputs: Inputs) -> TokenRewardModel:
    """Build this rank's stage of the reward model, from `reward_model.path` or the policy. Collective."""
    folder = inputs.reward_folder or inputs.folder
    return TokenRewardModel(inputs.arch, inputs.config, folder.tensor)
