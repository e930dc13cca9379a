"""`oreal distill`: supervised fine-tuning in which the policy imitates a teacher as well (PKD, arXiv 2207.02039).

Demonstrations, order, steps, evaluations, checkpoints and resumes are those of `oreal sft`, section `supervised`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oreal_megatron.config import ConfigError
from oreal_megatron.convert import to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.data import problems
from oreal_megatron.models import architecture
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.session.inputs import Inputs
from oreal_megatron.training.supervised import CrossEntropy

if TYPE_CHECKING:
    from oreal_megatron.mcore import trained_models


class Distillation(CrossEntropy):
    """Cross entropy with a teacher's term: the method of `oreal distill`."""

    command = "oreal distill"
    unread = ("reward_training.",)

    def check(self, inputs: Inputs) -> dict[str, str]:
        """Return the digest of the teacher. Raises ConfigError for one that the student cannot imitate."""
        folder, arch = read_teacher(inputs)
        self.folder, self.arch = folder, arch
        return {"distillation.teacher": folder.fingerprint()}

    def build(self, inputs: Inputs) -> trained_models.Policy:
        """Build student and teacher on this rank. Collective."""
        from oreal_megatron.mcore import distillation, trained_models  # these import Megatron, which takes seconds

        teacher = trained_models.Reference(self.arch, inputs.config, self.folder.tensor)
        return distillation.Student(inputs.arch, inputs.config, inputs.folder.tensor, teacher, self.arch)


def read_teacher(inputs: Inputs) -> tuple[HFFolder, Architecture]:
    """Return the teacher's folder and architecture. Raises ConfigError for one that the student cannot imitate."""
    config = inputs.config
    path, layout = config.distillation.teacher, config.parallel
    if not path:
        raise ConfigError("distillation.teacher names no model; set it to the Hugging Face folder of the teacher")
    if layout.pipeline > 1:
        raise ConfigError(
            f"parallel.pipeline is {layout.pipeline}, but `oreal distill` compares layers of two models within a "
            "stage; set parallel.pipeline=1 and use parallel.tensor, parallel.context or more replicas"
        )
    folder = HFFolder(path)
    arch = architecture.read(folder.config)
    if architecture.head(folder.config) != "lm":
        raise ConfigError(f"distillation.teacher is {path}, a reward model; expected a language model")
    to_megatron.check_weights(folder, arch, "lm")
    arch.check_layout(layout.tensor, layout.pipeline, layout.virtual)
    _check_features(inputs, path, arch)
    _check_vocabulary(inputs, path, arch)
    if arch.max_positions < inputs.arch.max_positions:
        raise ConfigError(
            f"the teacher {path} was made for {arch.max_positions} positions, the student for "
            f"{inputs.arch.max_positions}; choose a teacher of at least as many"
        )
    return folder, arch


def _check_features(inputs: Inputs, path: str, arch: Architecture) -> None:
    """Check that hidden states can be compared: equal widths or a projection, and as many layers as are compared."""
    distillation, student = inputs.config.distillation, inputs.arch
    if distillation.on_logits:
        return
    if arch.hidden != student.hidden and not distillation.projection:
        raise ConfigError(
            f"the teacher {path} has hidden states of {arch.hidden} channels, the student of {student.hidden}; set "
            "distillation.projection=true to learn a linear map between them, or compare logits instead: "
            "distillation.objective=pearson_logits or kl_logits"
        )
    if distillation.layers > min(arch.layers, student.layers):
        raise ConfigError(
            f"distillation.layers is {distillation.layers}, but student and teacher have {student.layers} and "
            f"{arch.layers} layers; set it to at most {min(arch.layers, student.layers)}"
        )


def _check_vocabulary(inputs: Inputs, path: str, arch: Architecture) -> None:
    """Check that both models read and predict the same tokens."""
    if arch.vocab != inputs.arch.vocab:
        raise ConfigError(
            f"the teacher {path} has a vocabulary of {arch.vocab} rows, the student of {inputs.arch.vocab}; "
            "distillation needs models of one tokenizer"
        )
    tokenizer = problems.load_tokenizer(path, inputs.config.model.trust_remote_code)
    if tokenizer.get_vocab() != inputs.tokenizer.get_vocab():
        raise ConfigError(
            f"the tokenizer of the teacher {path} numbers its tokens otherwise than that of "
            f"{inputs.config.model.path}; distillation needs models of one tokenizer"
        )
