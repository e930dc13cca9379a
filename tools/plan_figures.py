"""The tables of docs/how_to/planning.md: what `oreal plan` says of every recipe of the paper, on two kinds of GPU.

python tools/plan_figures.py              memory and time
python tools/plan_figures.py --rollouts   policies for the long tail of generation, on H100s
"""

from __future__ import annotations

import sys
from pathlib import Path

from oreal_megatron import settings
from oreal_megatron.models import architecture
from oreal_megatron.plan import estimate, gpus, published, rollout_report, rollout_simulation
from oreal_megatron.plan.estimate import GIB
from oreal_megatron.plan.scenario import Scenario

RECIPES = Path(__file__).parent.parent / "examples/recipes/oreal.py"
COLUMNS = ("recipe", "GPUs", "fullest phase", "GiB left", "largest KV cache, GiB", "s/step", "of them generating",
           "tokens/s/GPU", "checkpoint, GB")  # fmt: skip


SIMULATED = ("oreal_7b_8_gpus", "oreal_7b", "oreal_32b_32_gpus", "oreal_32b")


def main() -> None:
    if sys.argv[1:] == ["--rollouts"]:
        return print_rollouts()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for line in RECIPES.read_text().splitlines():
        if line.startswith("def oreal_"):
            for gpu in ("a100-80g", "h100-80g"):
                print(row(line[4:].split("(")[0], gpu), flush=True)


def plan_of(recipe: str, gpu: str) -> estimate.Estimate:
    config = settings.from_recipe(f"{RECIPES}:{recipe}")
    arch = architecture.read(published.read_config(config.model.path)[0])
    return estimate.estimate_scenario(Scenario(config, arch, gpus.find_gpu(gpu), config.gpus))


def print_rollouts() -> None:
    columns: dict[str, list[str]] = {}
    for recipe in SIMULATED:
        plan = plan_of(recipe, "h100-80g")
        lengths = rollout_report.length_source(plan, "")
        results = rollout_simulation.compare(plan.scenario, plan.step_seconds - plan.seconds["generate"], lengths)
        for result in results:
            name = "one step ahead" if result.policy.separate else result.policy.name
            ratio = result.tokens_per_gpu_second / results[0].tokens_per_gpu_second
            columns.setdefault(name, []).append(
                f"{ratio:.2f} ({result.step_s:.0f} s, idle {result.idle_share:.0%}, length {result.length_ratio:.2f})"
            )
    print("| policy | " + " | ".join(f"`{recipe}`" for recipe in SIMULATED) + " |")
    print("|---" * (len(SIMULATED) + 1) + "|")
    for name, cells in columns.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def row(recipe: str, gpu: str) -> str:
    made, config = plan_of(recipe, gpu), settings.from_recipe(f"{RECIPES}:{recipe}")
    return (
        f"| `{recipe}` | {config.gpus} {gpu} | {made.fullest.fullest} | {made.spare / GIB:.1f} "
        f"| {made.largest_cache / GIB:.0f} | {made.step_seconds:.0f} | {made.seconds['generate']:.0f} "
        f"| {made.tokens_per_gpu_second:.0f} | {made.checkpoint[0] / 1e9:.0f} |"
    )


if __name__ == "__main__":
    main()
