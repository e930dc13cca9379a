"""Break a training job at random moments, resume it, and compare what it leaves with an undisturbed run.

    python tools/fault_campaign.py --runs 20 --seed 0

The job is that of examples/addition.sh, shortened, with a judge; its inputs are made first (a minute). Faults take
turns: one rank or all processes killed, one killed under a torchrun that restarts them, SIGTERM to the launcher, a disk
filled under the checkpoints (a mounted tmpfs, which needs root), the newest checkpoint damaged after a kill, the judge
killed and back after a while. A job that ends with another exit code than 0 is started again with `--resume auto`.
Prints a table; `--out FOLDER` keeps it as table.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m", "oreal_megatron"]
OREAL = [*PYTHON, "--processes", "2"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "3",
]
RESTARTING = [*TORCHRUN, "-m", "oreal_megatron"]
HUNG_S, MOST_STARTS = 300.0, 6
HEADER = ["fault", "after (s)", "exit codes", "steps repeated", "final state", "seconds"]
JUDGE = """
import http.server, json, sys
class Judge(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def do_GET(self):
        self.answer({"data": [{"id": "always wrong"}]})
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer({"choices": [{"message": {"content": "WRONG"}}]})
    def log_message(self, *_): ...
http.server.ThreadingHTTPServer.request_queue_size = 256
http.server.ThreadingHTTPServer.handle_error = lambda *_: None  # of those who hung up
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Judge).serve_forever()
"""


@dataclasses.dataclass
class Outcome:
    """What became of one disturbed run."""

    fault: str
    moment_s: float
    exits: list[int] = dataclasses.field(default_factory=list)  # of every start, in order
    repeated: int = 0  # steps done again
    differs: str = ""  # the first thing that is not as undisturbed
    seconds: float = 0.0


class Job:
    """One run folder of the recipe, started as often as it takes."""

    def __init__(self, recipe: str, settings: list[str], run: Path):
        self.recipe, self.settings, self.run, self.process = recipe, [*settings, f"run={run}"], run, None

    def start(self, launcher: Sequence[str] = OREAL) -> None:
        self.run.parent.mkdir(parents=True, exist_ok=True)
        changes = [part for setting in self.settings for part in ("--set", setting)]
        command = [*launcher, "train", self.recipe, "--resume", "auto", *changes]
        with open(f"{self.run}.log", "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def ranks(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if "oreal_megatron" in child.cmdline()]

    def kill_all(self) -> None:
        for process in [psutil.Process(self.process.pid), *self.ranks()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def steps(self) -> int:
        """Written by it so far."""
        file = self.run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def wait(self) -> int:
        """Its exit code; one that writes nothing for too long is ended and counts as hung."""
        seen, since = -1, time.monotonic()
        while self.process.poll() is None:
            if (now := os.stat(f"{self.run}.log").st_size + self.steps()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > HUNG_S:
                self.kill_all()
                raise TimeoutError(f"nothing happened for {HUNG_S:.0f} s; see {self.run}.log")
            time.sleep(0.2)
        return self.process.returncode


class Judge:
    """A judge server that finds every answer wrong, on one port for all its lives."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", JUDGE, str(self.port)])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def kill_a_rank(job: Job, judge: Judge, chance: random.Random) -> None:
    if ranks := job.ranks():
        chance.choice(ranks).kill()


def kill_all(job: Job, judge: Judge, chance: random.Random) -> None:
    job.kill_all()


def sigterm(job: Job, judge: Judge, chance: random.Random) -> None:
    job.process.send_signal(signal.SIGTERM)


def damaged_checkpoint(job: Job, judge: Judge, chance: random.Random) -> None:
    job.kill_all()
    newest = max(job.run.glob("checkpoints/step_*[0-9]"), default=None)
    if newest:
        file = chance.choice(sorted(newest.glob("*/*")))
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)


def dead_judge(job: Job, judge: Judge, chance: random.Random) -> None:
    judge.stop()
    time.sleep(chance.uniform(2, 8))
    judge.start()


def full_disk(job: Job, judge: Judge, chance: random.Random) -> None:
    folder = job.run / "checkpoints"
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    deadline = time.monotonic() + 30
    while job.process.poll() is None and time.monotonic() < deadline:
        if "waiting" in Path(f"{job.run}.log").read_text():
            time.sleep(chance.uniform(1, 5))
            break
        time.sleep(0.2)
    filler.unlink()


FAULTS = {
    "kill a rank": kill_a_rank,
    "kill all": kill_all,
    "SIGTERM": sigterm,
    "full disk": full_disk,
    "damaged checkpoint": damaged_checkpoint,
    "dead judge": dead_judge,
    "kill a rank, torchrun restarts": kill_a_rank,
}


@contextlib.contextmanager
def small_disk(folder: Path, fault: str) -> Iterator[None]:
    """A file system of its own under the checkpoints, where the fault is to fill it."""
    if fault != "full disk":
        yield
        return
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disturb(job: Job, judge: Judge, fault: str, moment_s: float, undisturbed: Path, chance: random.Random) -> Outcome:
    """Start, break at the moment, resume until it ends well, compare."""
    outcome, begin = Outcome(fault, moment_s), time.monotonic()
    with small_disk(job.run / "checkpoints", fault):
        job.start(RESTARTING if "torchrun" in fault else OREAL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(moment_s)
        FAULTS[fault](job, judge, chance)
        try:
            outcome.exits.append(job.wait())
            while outcome.exits[-1] and len(outcome.exits) < MOST_STARTS:
                outcome.repeated += again(job)
                job.start()
                outcome.exits.append(job.wait())
        except TimeoutError as error:
            outcome.differs = str(error)
        outcome.differs = outcome.differs or difference(undisturbed, job.run)
    outcome.seconds = time.monotonic() - begin
    return outcome


def again(job: Job) -> int:
    """Steps that the next start will repeat."""
    latest = job.run / "checkpoints" / "latest"
    return job.steps() - (int(latest.read_text().strip().removeprefix("step_")) if latest.is_file() else 0)


def difference(wanted: Path, run: Path) -> str:
    """The first thing in which a run's results differ from another's, clocks aside; empty when there is none."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        if rows(wanted / name) != rows(run / name):
            return name
    names = ["policy/model.safetensors", *(str(file.relative_to(wanted)) for file in sorted(wanted.glob("rollouts/*")))]
    last = max(wanted.glob("checkpoints/step_*[0-9]"))
    names += [str(file.relative_to(wanted)) for file in sorted(last.glob("*/*.distcp"))]
    if name := next((name for name in names if read(wanted / name) != read(run / name)), ""):
        return name
    common = [str(file.relative_to(wanted)) for file in sorted(last.glob("*/common.pt"))]
    return next((name for name in common if values(wanted / name) != values(run / name)), "")


def rows(file: Path) -> list[dict]:
    lines = file.read_text().splitlines() if file.is_file() else []
    read = (json.loads(line).items() for line in lines)
    return [{key: value for key, value in row if "second" not in key and not key.startswith("speed/")} for row in read]


def values(file: Path) -> list:
    """What a file of torch.save holds, flattened; how it is pickled depends on what shares memory."""

    def flat(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield from (key, *flat(below))
        elif isinstance(value, list | tuple):
            for below in value:
                yield from flat(below)
        else:
            yield value.tolist() if isinstance(value, torch.Tensor) else value

    return list(flat(torch.load(file, weights_only=True))) if file.is_file() else []


def read(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def prepare(folder: Path, steps: int) -> list[str]:
    """The addition task's policy and problems; the settings that name them."""
    if not (folder / "sft/policy/model.safetensors").is_file():
        subprocess.run([sys.executable, ROOT / "tools/make_addition_task.py", folder, "--seed", "0"], check=True)
        places = [f"run={folder}/sft", f"model.path={folder}/start", f"data.held_out={folder}/problems.jsonl",
                  f"supervised.path={folder}/demonstrations.jsonl", "seed=0"]  # fmt: skip
        changes = [part for place in places for part in ("--set", place)]
        recipe = f"{ROOT}/examples/recipes/addition.py:sft"
        subprocess.run([*PYTHON, "--processes", "2", "sft", recipe, *changes], check=True)
    return [
        f"model.path={folder}/sft/policy",
        f"data.path={folder}/problems.jsonl",
        f"data.held_out={folder}/held_out.jsonl",
        "seed=0",
        f"steps={steps}",
        "policy_freeze_steps=2",
        f"optimizer.warmup_steps={min(10, steps - 2)}",
        f"reward_model.optimizer.warmup_steps={min(10, steps)}",
        f"checkpoint.every={steps // 4}",
        f"evaluation.every={steps // 2}",
        "data.prompts_per_step=32",
        "sampling.rollouts_per_prompt=8",
        "verify.timeout_s=60",
    ]


def cells(one: Outcome) -> list[str]:
    exits, state = " ".join(map(str, one.exits)), one.differs or "equal bit by bit"
    return [one.fault, f"{one.moment_s:.1f}", exits, str(one.repeated), state, f"{one.seconds:.0f}"]


def keep(outcomes: list[Outcome], out: Path | None) -> None:
    """The table so far, as Markdown."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        lines = [HEADER, ["---"] * len(HEADER), *map(cells, outcomes)]
        (out / "table.md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))


def show(outcomes: list[Outcome], title: str) -> None:
    table = Table(*HEADER, title=title)
    for one in outcomes:
        table.add_row(*cells(one))
    Console(width=120).print(table)
    equal = sum(not one.differs for one in outcomes)
    print(f"{equal} of {len(outcomes)} equal bit by bit, most steps repeated {max(one.repeated for one in outcomes)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12, help="of the job, which saves four times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="which, taken in turns")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="for inputs and runs")
    parser.add_argument("--out", type=Path, help="where to keep the table")
    args = parser.parse_args()
    chance, judge = random.Random(args.seed), Judge()
    recipe = f"{ROOT}/examples/recipes/addition.py:oreal"
    try:
        settings = [*prepare(args.folder, args.steps), f"verify.judge.urls=('http://127.0.0.1:{judge.port}',)"]
        shutil.rmtree(args.folder / "undisturbed", ignore_errors=True)
        undisturbed, begin = Job(recipe, settings, args.folder / "undisturbed"), time.monotonic()
        undisturbed.start()
        if code := undisturbed.wait():
            raise SystemExit(f"the undisturbed run ended with {code}; see {undisturbed.run}.log")
        length_s, outcomes = time.monotonic() - begin, []
        for number in track(range(args.runs), "faults"):
            fault, run = args.faults[number % len(args.faults)], args.folder / f"disturbed_{number:02d}"
            shutil.rmtree(run, ignore_errors=True)
            Path(f"{run}.log").unlink(missing_ok=True)
            moment_s = chance.uniform(0, length_s)
            outcomes.append(disturb(Job(recipe, settings, run), judge, fault, moment_s, undisturbed.run, chance))
            keep(outcomes, args.out)
    finally:
        judge.stop()
    show(outcomes, f"{args.steps} steps, undisturbed {length_s:.0f} s")
    return int(any(one.differs for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
