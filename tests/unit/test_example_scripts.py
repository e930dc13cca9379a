"""Arguments of the example scripts: what cannot be meant is refused before anything is installed or made."""

from __future__ import annotations

import subprocess

import pytest
from repository import ROOT


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        *((script, [option]) for script in ("quickstart", "addition", "t1") for option in ("--seed", "--nonsense")),
        *((script, ["--seed", "1.5"]) for script in ("quickstart", "addition", "t1")),
        *(("smollm2", arguments) for arguments in (["--steps"], ["--steps", "0"], ["--nonsense"])),
        *(
            (script, ["many"])
            for script in ("ablation", "reward_model_arms", "t1_ablation", "long_tail", "smollm2_arms")
        ),
        ("long_tail", ["2", "nonsense"]),
    ],
)
def test_bad_arguments_of_an_example_are_refused_with_a_sentence(script, arguments):
    ended = subprocess.run(
        ["bash", str(ROOT / f"examples/{script}.sh"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith(f"{script}: ") and ended.stderr.count("\n") == 1
