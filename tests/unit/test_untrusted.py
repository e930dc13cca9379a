"""Files from elsewhere run no code, and a key of the environment stays there."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from oreal_megatron import config as c
from oreal_megatron.convert.torch_dist import TorchDistWriter
from oreal_megatron.data import problems
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.records import Outcome
from oreal_megatron.runtime import safe_load
from oreal_megatron.runtime.chat_client import API_KEY
from oreal_megatron.verify.grader import Grader
from oreal_megatron.verify.judge import JudgeClient
from oreal_megatron.verify.worker_pool import Pool

KEY = "sk-never-written-down"


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    writer = TorchDistWriter(folder)
    writer.tensor(0, "weight", (4, 2), (0, 0), torch.rand(4, 2))
    writer.object(0, "extra/shard_0_1", [None])
    writer.close()
    torch.save(
        {"step": 3, "past": {"norms": (1.0, 2.0)}, "random": [{"torch": torch.get_rng_state()}]}, folder / "common.pt"
    )
    return folder


def poison_metadata(folder: Path, evil: Evil) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(evil))


def poison_common(folder: Path, evil: Evil) -> None:
    torch.save({"step": evil}, folder / "common.pt")


def poison_object(folder: Path, evil: Evil) -> None:
    writer = TorchDistWriter(folder)
    writer.object(0, "extra/shard_0_1", evil)
    writer.close()


def test_a_sound_checkpoint_passes(checkpoint):
    safe_load.check(checkpoint)
    from oreal_megatron.mcore import checkpoint_state as mcore_checkpoint

    mcore_checkpoint.check(checkpoint)


@pytest.mark.parametrize("poison", [poison_metadata, poison_common, poison_object])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(poison, checkpoint, tmp_path):
    from oreal_megatron.mcore import checkpoint_state as mcore_checkpoint

    mark = tmp_path / "was run"
    poison(checkpoint, Evil(mark))
    for read in (safe_load.check, mcore_checkpoint.check, lambda path: mcore_checkpoint._load(path, None)):
        with pytest.raises(c.ConfigError, match="damaged"):
            read(checkpoint)
    assert not mark.exists()


def test_torch_would_have_run_it(checkpoint, tmp_path):
    """Else nothing above says anything."""
    mark = tmp_path / "was run"
    poison_metadata(checkpoint, Evil(mark))
    with pytest.raises(AttributeError):
        filesystem.FileSystemReader(checkpoint).read_metadata()
    assert mark.exists()


def test_a_checkpoint_names_no_file_outside_itself(checkpoint):
    read = safe_load.metadata(checkpoint)
    for info in read.storage_data.values():
        object.__setattr__(info, "relative_path", "../secret")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(read))
    with pytest.raises(c.ConfigError, match="names the file ../secret, outside the checkpoint"):
        safe_load.check(checkpoint)


def test_the_code_of_a_tokenizer_is_run_only_when_it_is_trusted(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "was run"
    shutil.copytree(model_folder, folder)
    file = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    problems.load_tokenizer(str(folder))
    assert not mark.exists()
    problems.load_tokenizer(str(folder), trust_remote_code=True)
    assert mark.exists()


def test_a_broken_tokenizer_is_named(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    with pytest.raises(c.ConfigError, match="the tokenizer of .*model cannot be loaded"):
        problems.load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize("url", ["http://me:secret@judge:8000", "https://judge/v1?key=secret", "http://secret@judge"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(c.ConfigError, match=f"URL of judge judge holds .* {API_KEY}") as error:
        JudgeClient(c.JudgeConfig(urls=(url,)))
    assert "secret" not in str(error.value)


@pytest.fixture
def server():
    """A judge that knows who asks; the keys it was given."""
    keys = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            keys.append(self.headers.get("Authorization"))
            known = keys[-1] == f"Bearer {KEY}"
            body = json.dumps({"choices": [{"message": {"content": "CORRECT"}}]}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", keys
    server.shutdown()


def test_the_key_reaches_the_judge_and_nothing_else(server, tmp_path, monkeypatch, caplog, capfd):
    url, keys = server
    monkeypatch.setenv(API_KEY, KEY)
    judge = c.JudgeConfig((url,), model="m", cache=str(tmp_path / "run/verdicts.jsonl"))
    config = c.Config(run=str(tmp_path / "run"), verify=c.VerifyConfig(workers=1, judge=judge))
    Recorder(config)
    with caplog.at_level(logging.DEBUG):
        grader = Grader(config.verify)
        verdict = grader.submit("5", "\\boxed{6}").result(timeout=30)
        grader.close()
    assert verdict.outcome is Outcome.CORRECT and keys == [f"Bearer {KEY}"]
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert written and KEY.encode() not in written
    assert caplog.text and KEY not in caplog.text and KEY not in "".join(capfd.readouterr())


WHAT_A_WORKER_SEES = """
import json, os, sys
print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps(["incorrect", "exact", os.environ.get("OREAL_JUDGE_API_KEY", "nothing"), 0.0]), flush=True)
"""


def test_grading_processes_do_not_have_the_key(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    pool = Pool(1, command=[sys.executable, "-c", WHAT_A_WORKER_SEES])
    assert pool.submit("text", "5", "6").result(timeout=30).extracted == "nothing"
    pool.close()
