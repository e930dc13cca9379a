"""Section of distillation: imitation of a teacher by a student's initial policy (PKD, arXiv 2207.02039)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from oreal_megatron.config.schema import FixedKey, InputKey, Key, Section


@dataclass(frozen=True)
class DistillationConfig(Section):
    """Distillation with `oreal distill`: a teacher's term beside the cross entropy; steps are those of `supervised`."""

    teacher: Annotated[str, InputKey("Hugging Face folder of the teacher, of the student's vocabulary")] = ""
    objective: Annotated[
        Literal["pearson", "mse", "pearson_logits", "kl_logits"],
        Key("1 - Pearson correlation or squared error of hidden states; 1 - correlation or KL divergence of logits"),
    ] = "pearson"
    layers: Annotated[
        int, Key("layers that are compared, at equal fractions of the depth; the last is one", low=1)
    ] = 4  # fmt: skip
    projection: Annotated[
        bool,
        FixedKey("learn a linear map of each compared layer to the teacher's width; needed where widths differ"),
    ] = False
    coef: Annotated[float, Key("coefficient of the objective", low=0.0)] = 1.0
    cross_entropy_coef: Annotated[float, Key("coefficient of the demonstrations' cross entropy", low=0.0)] = 1.0
    temperature: Annotated[
        float, Key("divisor of both models' logits in kl_logits, whose loss is multiplied by its square", 0.01, 100.0)
    ] = 1.0

    @property
    def on_logits(self) -> bool:
        """True if logits are compared, so that widths may differ."""
        return self.objective.endswith("_logits")

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message if no term is left, or a projection would be read by none."""
        if self.coef == self.cross_entropy_coef == 0:
            yield f"{path}coef and {path}cross_entropy_coef are 0, so nothing would be learned; set one above 0"
        if self.projection and self.on_logits:
            yield (
                f"{path}projection is set, but {path}objective={self.objective} compares logits, which have one width; "
                f"set {path}projection=false, or {path}objective to pearson or mse"
            )
