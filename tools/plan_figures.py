"""The table of docs/how_to/planning.md: what `oreal plan` says of every recipe of the paper, on two kinds of GPU.

python tools/plan_figures.py
"""

from __future__ import annotations

from pathlib import Path

from oreal_megatron import settings
from oreal_megatron.models import architecture
from oreal_megatron.plan import estimate, gpus, published
from oreal_megatron.plan.estimate import GIB
from oreal_megatron.plan.scenario import Scenario

RECIPES = Path(__file__).parent.parent / "examples/recipes/oreal.py"
COLUMNS = ("recipe", "GPUs", "fullest phase", "GiB left", "largest KV cache, GiB", "s/step", "of them generating",
           "tokens/s/GPU", "checkpoint, GB")  # fmt: skip


def main() -> None:
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for line in RECIPES.read_text().splitlines():
        if line.startswith("def oreal_"):
            for gpu in ("a100-80g", "h100-80g"):
                print(row(line[4:].split("(")[0], gpu), flush=True)


def row(recipe: str, gpu: str) -> str:
    config = settings.from_recipe(f"{RECIPES}:{recipe}")
    arch = architecture.read(published.read_config(config.model.path)[0])
    made = estimate.estimate_scenario(Scenario(config, arch, gpus.find_gpu(gpu), config.gpus))
    return (
        f"| `{recipe}` | {config.gpus} {gpu} | {made.fullest.fullest} | {made.spare / GIB:.1f} "
        f"| {made.largest_cache / GIB:.0f} | {made.step_seconds:.0f} | {made.seconds['generate']:.0f} "
        f"| {made.tokens_per_gpu_second:.0f} | {made.checkpoint[0] / 1e9:.0f} |"
    )


if __name__ == "__main__":
    main()
