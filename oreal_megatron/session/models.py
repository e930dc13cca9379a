"""The models of a run on this rank: policy, reference and token-level reward model."""

from __future__ import annotations

from typing import NamedTuple

from oreal_megatron.config import Config
from oreal_megatron.mcore.moving_reference import MovingReference, build_reference
from oreal_megatron.mcore.saved_model import SavedModel
from oreal_megatron.mcore.trained_models import NoRewardModel, Policy, Reference, TokenRewardModel
from oreal_megatron.session.inputs import Inputs


class Models(NamedTuple):
    """Models of a run, and those of them that change and are saved, by their name in checkpoints."""

    policy: Policy
    reference: Reference
    reward_model: TokenRewardModel | NoRewardModel
    saved: dict[str, SavedModel]


def saved_names(config: Config) -> list[str]:
    """Return the names of the models that the checkpoints of a run contain."""
    return ["policy", *["reward_model"] * config.reward_model.enabled, *["reference"] * config.reference.moves]


def build_models(inputs: Inputs) -> Models:
    """Build this rank's stages of all models from the starting policy. Collective."""
    parts = (inputs.arch, inputs.config, inputs.folder.tensor)
    policy = Policy(*parts)
    reference = build_reference(*parts, policy)
    reward_model = build_reward_model(inputs) if inputs.config.reward_model.enabled else NoRewardModel(inputs.config)
    saved: dict[str, SavedModel] = {"policy": policy}
    if isinstance(reward_model, TokenRewardModel):
        saved["reward_model"] = reward_model
    if isinstance(reference, MovingReference):
        saved["reference"] = reference
    return Models(policy, reference, reward_model, saved)


def build_reward_model(inputs: Inputs) -> TokenRewardModel:
    """Build this rank's stage of the reward model, from `reward_model.path` or the policy. Collective."""
    folder = inputs.reward_folder or inputs.folder
    return TokenRewardModel(inputs.arch, inputs.config, folder.tensor)
