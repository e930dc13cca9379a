"""What the scripts of examples/ would run on every machine, and how the launcher ends."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args

from oreal_megatron.cli import main
from oreal_megatron.runtime import launcher

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted({*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch"), *ROOT.glob("t*/*.sh")})


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OREAL", "SLURM", "PET"))}
    command = ["bash", str(ROOT / "examples" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | variables, timeout=60)


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text("#!/usr/bin/env bash\n" + text)
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A folder whose programs come before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "requirements/dev.txt brings it"
    found = subprocess.run([shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert len(SCRIPTS) >= 10 and found.returncode == 0, found.stdout


def commands(shown: str) -> dict[str, list[str]]:
    """The words that every machine would run, by machine, from a dry run."""
    heads = [line[2:] for line in shown.splitlines() if line.startswith("# ")][1:]
    runs = [shlex.split(line) for line in shown.splitlines() if line.startswith("env ") and " train " in line]
    return dict(zip(heads, runs, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["doctor", "--gpus", "8"]),
        (("--gpus", "4"), ["doctor", "--gpus", "4"]),
        (("--quick-doctor",), ["doctor", "--gpus", "8", "--quick"]),
        (("--no-doctor",), None),
    ],
)
def test_every_machine_is_checked_with_real_runs_in_the_environment_of_the_training(arguments, words):
    result = script("cluster/launch.sh", "--recipe", "oreal_7b_8_gpus", *arguments, "--dry-run")
    lines = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("env ")]
    assert len(lines) == (1 if words is None else 2), result.stderr
    if words is not None:
        check, train = lines
        start = check.index("doctor")
        assert check[start:-1] == words and check[-1].endswith("oreal_7b_8_gpus")
        assert check[: start - 3] == train[: start - 3], "NCCL and torch are set up as for the training"
        main.parser("doctor").parse_args(check[start:])


@pytest.mark.parametrize(
    ("name", "arguments", "machines", "recipe"),
    [
        ("run_oreal_32b.sh", (), 16, "oreal_32b"),
        ("run_oreal_32b.sh", ("--recipe", "oreal_32b_32_gpus"), 4, "oreal_32b_32_gpus"),
        ("run_oreal_7b.sh", (), 4, "oreal_7b"),
        ("run_oreal_7b.sh", ("--recipe", "oreal_7b_without_reward_model_8_gpus"), 1, "..._8_gpus"),
        ("run_oreal_7b.sh", ("--hosts", "a,b", "--gpus-per-node", "16"), 2, "oreal_7b"),
    ],
)
def test_a_dry_run_shows_commands_that_meet_at_one_place(name, arguments, machines, recipe):
    result = script(name, *arguments, "--dry-run", "--", "--set", "run=a b")
    assert result.returncode == 0, result.stderr
    shown = commands(result.stdout)
    assert len(shown) == machines
    for host, words in shown.items():
        inner = words[words.index("oreal_megatron") + 1 :]
        train = inner[inner.index("train") :]
        assert train[1].endswith(recipe.removeprefix("...")) and train[2:] == ["--resume", "auto", "--set", "run=a b"]
        args = main.parser("train").parse_args(inner)
        torchrun = parse_args([*launcher.torchrun(args, ""), "-m", "oreal_megatron"])
        assert (torchrun.nnodes, torchrun.log_dir.split("/")[-1]) == (str(machines), host) or torchrun.standalone
        assert args.rendezvous == (f"{next(iter(shown))}:29400" if machines > 1 else None)


@pytest.mark.parametrize(
    ("gpus", "arguments", "recipe"),
    [
        (8, (), "oreal_7b_8_gpus"),
        (8, ("--hosts", "a,b,c,d"), "oreal_7b"),
        (8, ("--recipe", "oreal_7b_without_reward_model_8_gpus"), "oreal_7b_without_reward_model_8_gpus"),
        (4, (), "oreal_7b"),
    ],
)
def test_one_machine_of_eight_gpus_gets_the_recipe_for_it(gpus, arguments, recipe, path):
    program(path, "nvidia-smi", f"seq -f 'GPU %g: NVIDIA H100 80GB HBM3' {gpus}")
    result = script("run_oreal_7b.sh", *arguments, "--dry-run")
    assert result.returncode == 0 and f"oreal.py:{recipe} on " in result.stdout, result.stdout + result.stderr
    assert ("this machine has 8 GPUs" in result.stderr) is (recipe == "oreal_7b_8_gpus")


@pytest.mark.parametrize("hosts", [["gpu7", "gpu8", "gpu9", "gpu10"], ["gpu10", "gpu8", "gpu7", "gpu9"]])
def test_a_slurm_job_brings_its_machines_in_any_order(path, hosts):
    program(path, "scontrol", "echo " + "; echo ".join(hosts))
    variables = {"SLURM_JOB_NODELIST": "gpu[7-10]", "SLURM_JOB_ID": "51", "MASTER_ADDR": "gpu9", "SLURM_PROCID": "2"}
    result = script("run_oreal_7b.sh", "--dry-run", **variables)
    shown = commands(result.stdout)
    assert list(shown) == hosts
    for words in shown.values():
        assert words[words.index("--rendezvous") + 1] == f"{hosts[0]}:29400" and "PET_RDZV_ID=51" in words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "this machine alone: bash examples/cluster/launch.sh --recipe examples/recipes/oreal.py:oreal_7b_8_gpus"),
        (("--hosts", "a,b"), "oreal_7b on 32 GPUs takes 4 machines of 8, not 2"),
        (("--hosts", "a,b", "--gpus-per-node", "12"), "32 GPUs cannot be had from machines of 12 each"),
        (("--recipe", "oreal_7bb"), "did you mean oreal_7b,"),
        (("--recipe", "nowhere.py:x"), "nowhere.py does not exist"),
        (("--gpu", "8"), "unknown option --gpu"),
        (("--gpus", "many"), "many is not a whole number"),
    ],
)
def test_what_cannot_be_started_is_told(arguments, says):
    result = script("run_oreal_7b.sh", *arguments)
    assert result.returncode == 2 and says in result.stderr, result.stderr


@pytest.fixture
def machines(path) -> Path:
    """Two machines a and b: an ssh that stays here, and a Python that writes down what it was to run."""
    program(path, "ssh", 'echo "$1" >> "$LOG/hosts"; exec bash -c "$2"')
    program(path, "python", f'''
        case $1 in -c) [[ $2 == *megatron.core* ]] || exec {sys.executable} "$@"; exit 0 ;; esac
        trap "echo stopped >> $LOG/$OREAL_HOST; exit 4" TERM
        echo "$@" >> "$LOG/$OREAL_HOST"
        env > "$LOG/environment_$OREAL_HOST"
        if [[ $SLOW == *$OREAL_HOST* ]]; then for i in {{1..200}}; do sleep 0.1; done; fi
        [ "$OREAL_HOST" = a ] || exit "$CODE"''')  # fmt: skip
    return path


def start(folder: Path, **variables: str) -> subprocess.Popen:
    words = ["bash", "examples/run_oreal_7b.sh", "--recipe", "oreal_7b_8_gpus", "--gpus-per-node", "4"]
    words += ["--hosts", "a,b", "--no-doctor", "--", "--set", "run=a b"]
    environment = (
        os.environ
        | {"PYTHON": "python", "LOG": str(folder), "OREAL_RUNS": str(folder / "runs"), "SLOW": "", "CODE": "0"}
        | variables
    )
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_listed_hosts_are_started_and_the_worst_end_counts(machines):
    process = start(machines, CODE="5", WORLD_SIZE="2", RANK="1")  # as Kubeflow sets them, for pods
    assert process.wait(30) == 5, process.stderr.read()
    assert sorted((machines / "hosts").read_text().split()) == ["a", "b"]
    for host in "ab":
        words = (machines / host).read_text()
        assert "--processes 4" in words and "--nodes 2 --rendezvous a:29400" in words
        seen = (machines / f"environment_{host}").read_text().splitlines()
        assert not any(line.startswith(("WORLD_SIZE", "RANK")) for line in seen)
        assert f"--logs {machines}/runs/logs/oreal_7b_8_gpus/{host} train" in words and "--set run=a b" in words


@pytest.mark.parametrize("code", [2, 3])
def test_a_final_end_outranks_a_lost_rank_and_ends_the_other_hosts(machines, code):
    """The other host would wait for its rendezvous, and call it a lost machine: "start it again"."""
    started = time.monotonic()
    process = start(machines, SLOW="a", CODE=str(code))
    assert process.wait(30) == code and time.monotonic() - started < 15, process.stderr.read()
    assert "stopped" in (machines / "a").read_text() and "stopped" not in (machines / "b").read_text()


def test_settings_go_along_and_no_command_line_shows_them(machines):
    carried = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "VLLM_LOGGING_LEVEL": "a 'b'", "OREAL_JUDGE_API_KEY": "secret"}
    # This ssh, unlike a real one, starts in the environment it was called from: hand it an empty one.
    ssh = 'echo "$@" >> "$LOG/seen"; exec env -i PATH="$PATH" LOG="$LOG" SLOW= CODE=0 bash -c "$2"'
    program(machines, "ssh", ssh)
    process = start(machines, **carried, CUDA_VISIBLE_DEVICES="0")
    assert process.wait(30) == 0, process.stderr.read()
    environment = (machines / "environment_b").read_text().splitlines()
    assert all(f"{name}={value}" in environment for name, value in carried.items())
    assert not any(line.startswith("CUDA_VISIBLE_DEVICES") for line in environment)
    assert "secret" not in (machines / "seen").read_text()


def test_a_signal_reaches_every_listed_host(machines):
    process = start(machines, SLOW="ab")
    pids = [machines / f"runs/logs/oreal_7b_8_gpus/{host}/pid" for host in "ab"]
    waited = time.monotonic() + 20
    while not all((machines / host).exists() for host in "ab") and time.monotonic() < waited:
        time.sleep(0.05)
    assert all(pid.exists() for pid in pids)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 4
    assert all("stopped" in (machines / host).read_text() for host in "ab")


@pytest.mark.parametrize(
    ("codes", "code", "back"),
    [
        ("0 0", 0, False),
        ("2 5", 2, False),
        ("5 3", 3, False),
        ("4 4", 4, True),
        ("5 4", 5, True),
        ("5 killed", 5, True),
    ],
)
def test_slurm_takes_back_what_should_be_started_again(path, codes, code, back):
    """One machine's part ends with each of the codes; srun with the largest, as Slurm's does."""
    program(path, "part", '[ "$1" != killed ] || kill -KILL $PPID; exit "$1"')
    program(
        path,
        "srun",
        f"""while [[ $1 == --* ]]; do shift; done; most=0
        for code in {codes}; do "$@" $code; ended=$?; [ $ended -le $most ] || most=$ended; done; exit $most""",
    )
    program(path, "scontrol", f'echo "$@" > {path}/called')
    body = "source examples/slurm/run.sh; run_and_requeue part"
    environment = os.environ | {"SLURM_JOB_ID": "51", "OREAL_RUNS": str(path)}
    result = subprocess.run(["bash", "-c", body], cwd=ROOT, env=environment, timeout=20)
    assert result.returncode == code
    assert (path / "called").exists() == back and (not back or (path / "called").read_text() == "requeue 51\n")


@pytest.mark.parametrize(("code", "told"), [(0, 0), (2, 2), (3, 3), (4, 138), (5, 138)])
def test_the_pods_say_when_to_start_again_and_hand_on_their_signal(tmp_path, code, told):
    job = yaml.safe_load((ROOT / "examples/kubernetes/oreal_7b.yaml").read_text())
    master, worker = (job["spec"]["pytorchReplicaSpecs"][kind] for kind in ("Master", "Worker"))
    assert (master["replicas"], worker["replicas"], worker["restartPolicy"]) == (1, 3, "ExitCode")
    container = worker["template"]["spec"]["containers"][0]
    (tmp_path / "examples").mkdir()
    program(
        tmp_path / "examples", "run_oreal_7b.sh", f'echo "$@"; trap "exit {code}" TERM; while :; do sleep 0.05; done'
    )
    pod = subprocess.Popen([*container["command"], *container["args"]], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert pod.stdout.readline() == "--nodes 4 --rendezvous oreal-7b-master-0:29400\n"
    time.sleep(0.1)
    pod.terminate()
    assert pod.wait(20) == told


RECIPE = """
import os, signal
def dies_then_is_wrong():
    with open({log!r}, "a") as file:
        file.write(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_lost_processes_are_replaced_and_bad_input_is_final(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE.format(log=str(tmp_path / "starts")))
    command = [sys.executable, "-m", "oreal_megatron", "--processes", "1", "--max-restarts", "3"]
    command += ["--logs", str(tmp_path / "logs"), "train", f"{tmp_path}/recipe.py:dies_then_is_wrong"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and (tmp_path / "starts").read_text() == "01", result.stderr
    assert "returned NoneType" in result.stderr and "Traceback" not in result.stderr
    assert any("returned NoneType" in file.read_text() for file in (tmp_path / "logs").glob("*/attempt_1/0/stderr.log"))


def test_a_killed_rank_is_named_and_counts_as_lost(capsys):
    class Failure:
        exitcode, error_file = -signal.SIGKILL, "logs/x/attempt_0/3/error.json"

    assert launcher._exit_code_of(11, Failure(), "logs") == 5
    assert "rank 11 was ended by SIGKILL; its output is in logs/x/attempt_0/3/" in capsys.readouterr().err


WRONG = """
from oreal_megatron.config import Config, LossConfig
def good(): return Config(steps=7, loss=LossConfig(kl_coef=0.5))
"""


def test_the_launcher_gives_the_exit_code_and_no_stack_trace(tmp_path):
    (tmp_path / "recipe.py").write_text(WRONG)
    command = [sys.executable, "-m", "oreal_megatron", "--processes", "2", "train", f"{tmp_path}/recipe.py:good"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    assert result.stderr.count("oreal train: ") == 1 and "would never be trained" in result.stderr
    assert "Traceback" not in result.stderr and "torch/distributed" not in result.stderr, result.stderr
