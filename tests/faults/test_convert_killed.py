"""A conversion that is killed leaves nothing that looks finished, and the next one starts over."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oreal_megatron.config import ConfigError, ParallelConfig
from oreal_megatron.convert import compare_checkpoints, stream, to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.convert.megatron_folder import MegatronFolder

SLOW = """
import sys, time
from pathlib import Path
from oreal_megatron.config import ParallelConfig
from oreal_megatron.convert import stream, to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
def slowly(count):
    print("writing", flush=True)
    time.sleep(60)
source = HFFolder(sys.argv[1], tokenizer=False)
to_megatron.convert(source, Path(sys.argv[2]), ParallelConfig(), stream.Cast(None), print, slowly)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_finished(write_model, tmp_path):
    source, out = Path(write_model(tmp_path / "hf", "Qwen2")), tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, source, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    with pytest.raises(ConfigError, match="is not a Megatron distributed checkpoint"):
        MegatronFolder(tmp_path / "out.partial")
    to_megatron.convert(HFFolder(str(source), tokenizer=False), out, ParallelConfig(), stream.Cast(None), print, print)
    assert compare_checkpoints.first_difference(HFFolder(source), MegatronFolder(out)) is None
