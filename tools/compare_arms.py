"""Train the arms of an experiment with paired seeds, and compare them with the first arm.

    python tools/compare_arms.py run examples/recipes/checked.py runs/arms --arms without_reward_model,oreal --jobs 2
    python tools/compare_arms.py table runs/arms --arms without_reward_model,oreal --picture arms.png

An arm is a function of the recipe file. Runs go to FOLDER/ARM/seed_N, all arms of a seed before the next seed. A second
start skips finished runs and begins unfinished ones anew. The table has every arm and every seed that is finished.
Both refuse a folder with finished runs of another starting policy.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import step_localisation

from oreal_megatron import settings
from oreal_megatron.config import ConfigError
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.observe.rows import read_rows
from oreal_megatron.runtime import files
from oreal_megatron.runtime.exit_codes import BAD_INPUT

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by freedom
ROOT = Path(__file__).resolve().parent.parent


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Return the run folder of an arm and a seed."""
    return folder / arm / f"seed_{seed}"


def is_finished(run: Path) -> bool:
    """Return whether a run has saved its final policy, which is the last that a run does."""
    return (run / "policy" / "config.json").is_file()


def starting_policy(run: Path) -> tuple[str, str]:
    """Return path and digest of the policy that a run started from; the digest is "" where none was recorded."""
    inputs = files.read_object(run / "environment.json").get("inputs", {})
    return files.read_object(run / "config.json")["model"]["path"], inputs.get("model.path", "")


def refuse_another_policy(
    recipe: str, folder: Path, arms: Sequence[str], seeds: Sequence[int], changes: Sequence[str]
) -> None:
    """Raise ConfigError for finished runs that started from another policy than their arm starts from now."""
    for arm in arms:
        finished = [run for seed in seeds if is_finished(run := run_folder(folder, arm, seed))]
        path = settings.load(f"{ROOT / recipe}:{arm}", list(changes)).model.path if finished else ""
        present = HFFolder(ROOT / path).fingerprint() if finished else ""
        for run in finished:
            if starting_policy(run)[1] not in ("", present):
                raise ConfigError(
                    f"{run} started from another policy than {path} is now, and results of two policies must not mix; "
                    f"name another folder than {folder}, or move that one away"
                )


def refuse_mixture(runs: Sequence[Path]) -> None:
    """Raise ConfigError for runs that started from different policies at one path."""
    first_of_path: dict[str, tuple[Path, str]] = {}
    for run in runs:
        path, digest = starting_policy(run)
        first, digest_of_first = first_of_path.setdefault(path, (run, digest)) if digest else (run, digest)
        if digest != digest_of_first:
            raise ConfigError(
                f"{first} and {run} started from different policies, both at {path}; their results cannot be compared. "
                "Move the runs of one of them away"
            )


def train(
    recipe: str, folder: Path, arm: str, seed: int, changes: Sequence[str], nice: int = 0, processes: int = 1
) -> int:
    """Train an arm with a seed in processes of its own, with output in FOLDER/ARM/seed_N.log; return the exit code."""
    run = run_folder(folder, arm, seed)
    if is_finished(run):
        return 0
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    assignments = [f"run={run}", f"seed={seed}", *changes]
    command = ["nice", "-n", str(nice), sys.executable, "-m", "oreal_megatron"]
    command += [*(["--processes", str(processes)] if processes > 1 else []), "train", f"{recipe}:{arm}"]
    command += [part for assignment in assignments for part in ("--set", assignment)]
    with open(run.with_suffix(".log"), "w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"{arm} seed {seed}: exit code {code.returncode}", flush=True)
    return code.returncode


def figures(run: Path) -> dict[str, float | None]:
    """Return accuracy after training, area under the curve, localisation and idle share, in [0, 1], and seconds.

    The area is the mean pass rate of the rollouts over all steps; no training problem is used twice. Seconds are those
    of generation in all steps. The idle share is that of ranks which wait for the slowest one; None for a single rank.
    """
    last, steps = read_rows(run / "evaluations.jsonl")[-1], read_rows(run / "metrics.jsonl")
    idle = [row["speed/idle/generate"] for row in steps if row.get("speed/idle/generate")]
    return {
        "sampled": last["sampled_accuracy"],
        "greedy": last["accuracy"],
        "area": statistics.fmean(row["reward/pass_rate"] for row in steps if "reward/pass_rate" in row),
        "generation, s": sum(row["seconds/generate"] for row in steps),
        "idle, %": 100 * statistics.fmean(idle) if idle else None,
        **{f"{name} AUC": value for name, value in step_localisation.of_run(run).items()},
    }


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and 95 % t interval of paired differences; an infinite interval of a single one."""
    mean, freedom = statistics.fmean(differences), len(differences) - 1
    if not freedom:
        return mean, -math.inf, math.inf
    margin = T_975[freedom] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - margin, mean + margin


def table(results: Mapping[str, Mapping[int, Mapping[str, float | None]]]) -> str:
    """Return a Markdown table: arm -> seed -> figures; differences in points to the first arm, of the seeds of both.

    Columns without a figure are left out. The ratio is that of the seconds of generation to those of the first arm.
    """
    baseline = next(iter(results.values()))
    rows = [_cells(arm, by_seed, baseline) for arm, by_seed in results.items()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(
    arm: str, by_seed: Mapping[int, Mapping[str, float | None]], baseline: Mapping[int, Mapping[str, float | None]]
) -> dict[str, str]:
    """Return the row of an arm by column."""

    def mean(name: str, text: Callable[[float | None], str]) -> str:
        return text(_mean([row[name] for row in by_seed.values()]))

    def compare(name: str, text: Callable[[Sequence[tuple[float, float]]], str]) -> str:
        if by_seed is baseline:
            return ""
        pairs = [(by_seed[seed][name], baseline[seed][name]) for seed in by_seed if seed in baseline]
        return text(pairs) if pairs else "no common seed"

    return {
        "arm": arm,
        "seeds": ", ".join(map(str, by_seed)),
        "sampled, %": mean("sampled", _percent),
        "by seed": ", ".join(_percent(row["sampled"]) for row in by_seed.values()),
        "difference of sampled (95 %)": compare("sampled", _difference),
        "greedy, %": mean("greedy", _percent),
        "area, %": mean("area", _percent),
        "difference of area (95 %)": compare("area", _difference),
        **{f"{name} AUC": mean(f"{name} AUC", _decimals(3)) for name in ("score", "weight", "rollout")},
        "generation, s": mean("generation, s", _decimals(0)),
        "ratio": compare(
            "generation, s", lambda pairs: f"{sum(own for own, _ in pairs) / sum(b for _, b in pairs):.2f}"
        ),
        "idle, %": mean("idle, %", _decimals(0)),
    }


def _difference(pairs: Sequence[tuple[float, float]]) -> str:
    mean, low, high = (100 * value for value in paired_interval([own - base for own, base in pairs]))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if math.isfinite(low) else f"{mean:+.1f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _decimals(digits: int) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else f"{value:.{digits}f}"


def draw(folder: Path, arms: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draw the pass rate of rollouts, smoothed over 10 steps: mean over the seeds of each arm, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for arm in arms:
        runs = [run for seed in seeds if is_finished(run := run_folder(folder, arm, seed))]
        logs = [read_rows(run / "metrics.jsonl") for run in runs]
        rates = [[row["reward/pass_rate"] for row in rows if "reward/pass_rate" in row] for rows in logs]
        curves = [[statistics.fmean(rate[max(0, i - 9) : i + 1]) for i in range(len(rate))] for rate in rates]
        if curves:
            steps = range(min(map(len, curves)))
            columns = [[curve[step] for curve in curves] for step in steps]
            (line,) = axes.plot(steps, list(map(statistics.fmean, columns)), label=f"{arm} ({len(curves)} seeds)")
            axes.fill_between(
                steps, list(map(min, columns)), list(map(max, columns)), alpha=0.12, color=line.get_color()
            )
    axes.set(xlabel="step", ylabel="pass rate of rollouts, mean of 10 steps")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    start, report = commands.add_parser("run"), commands.add_parser("table")
    start.add_argument("recipe")
    for command in (start, report):
        command.add_argument("folder", type=Path)
        command.add_argument("--arms", required=True, help="functions of the recipe, separated by commas")
        command.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1")
    start.add_argument("--jobs", type=int, default=1, help="runs side by side")
    start.add_argument("--processes", type=int, default=1, help="of each run")
    start.add_argument("--nice", type=int, default=0)
    start.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    report.add_argument("--picture", type=Path)
    args = parser.parse_args()
    try:
        return _run(args) if args.command == "run" else _print_table(args)
    except ConfigError as error:
        print(f"compare_arms: {error}", file=sys.stderr)
        return BAD_INPUT


def _run(args: argparse.Namespace) -> int:
    """Train what is not finished; return the largest exit code."""
    arms, seeds, folder = args.arms.split(","), range(args.seeds), args.folder.resolve()
    refuse_another_policy(args.recipe, folder, arms, seeds, args.set)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(train, args.recipe, folder, arm, seed, args.set, args.nice, args.processes)
            for seed in seeds
            for arm in arms
        ]
    return max(job.result() for job in jobs)


def _print_table(args: argparse.Namespace) -> int:
    """Print the table of the finished runs and draw their picture."""
    arms, seeds = args.arms.split(","), range(args.seeds)
    runs = {
        arm: {seed: run for seed in seeds if is_finished(run := run_folder(args.folder, arm, seed))} for arm in arms
    }
    refuse_mixture([run for by_seed in runs.values() for run in by_seed.values()])
    results = {arm: {seed: figures(run) for seed, run in by_seed.items()} for arm, by_seed in runs.items() if by_seed}
    print(table(results))
    if args.picture:
        draw(args.folder, arms, seeds, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
