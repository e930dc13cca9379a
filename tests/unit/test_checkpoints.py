"""Checkpoint folders without a model in them: damage, order, retention; writes onto a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from oreal_megatron.runtime import checkpoint_folders, files


def write(folder: Path, step: int, text: str = "tensors") -> Path:
    partial = folder / (checkpoint_folders.name(step) + checkpoint_folders.PARTIAL)
    checkpoint_folders.begin(partial, ["policy"])
    (partial / "policy" / "file").write_text(text)
    return checkpoint_folders.finish(partial, {})


def test_a_whole_checkpoint_is_sound_and_latest(tmp_path):
    path = write(tmp_path, 10)
    assert checkpoint_folders.damage(path) is None
    assert (tmp_path / "latest").read_text() == "step_000010\n" and checkpoint_folders.candidates(tmp_path) == [path]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / "policy/file").write_text("tensorS"), "policy/file does not have the SHA-256"),
        (lambda path: (path / "policy/file").write_text("tensor"), "policy/file has 6 bytes, the manifest says 7"),
        (lambda path: (path / "policy/file").unlink(), "policy/file is missing"),
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"policy/file"'), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named(harm, said, tmp_path):
    path = write(tmp_path, 10)
    harm(path)
    assert said in str(checkpoint_folders.damage(path))


def test_each_reader_reads_its_share_of_the_files(tmp_path):
    path = write(tmp_path, 10)
    (path / "policy/file").write_text("tensorS")
    seen = [checkpoint_folders.damage(path, share, 2) for share in range(2)]
    assert sum(damage is not None for damage in seen) == 1


def test_half_written_ones_do_not_count_and_go(tmp_path):
    (tmp_path / "step_000020.partial" / "policy").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    path = write(tmp_path, 10)
    assert checkpoint_folders.complete(tmp_path) == [path]
    assert not (tmp_path / "step_000020.partial").exists() and (tmp_path / "notes").exists()


def test_a_run_that_went_back_keeps_what_it_wrote_since(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    checkpoint_folders.make_latest(tmp_path / "step_000002")
    again = write(tmp_path, 4, "other tensors")
    checkpoint_folders.prune(tmp_path, keep=1, keep_every=0)
    assert checkpoint_folders.candidates(tmp_path) == [again]
    assert (again / "policy/file").read_text() == "other tensors" and checkpoint_folders.damage(again) is None


def test_the_newest_and_every_so_many_stay(tmp_path):
    for step in range(10, 80, 10):
        write(tmp_path, step)
        checkpoint_folders.prune(tmp_path, keep=2, keep_every=30)
    assert [checkpoint_folders.step_of(path) for path in checkpoint_folders.complete(tmp_path)] == [30, 60, 70]


def full(times: int):
    """A write that fails for want of room, as torch.save hides it, before it succeeds."""
    left = [times]

    def write(value: str) -> str:
        left[0] -= 1
        if left[0] >= 0:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                raise RuntimeError("enforce fail at inline_container.cc")  # noqa: B904
        return value

    return write


def test_a_full_disk_is_waited_for_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "RETRY_S", 0.001)
    assert files.write_when_space(tmp_path, full(3), "written") == "written"
    said = caplog.text
    assert said.count("no space left") == 1 and "there is space" in said
    with pytest.raises(ValueError, match="other"):
        files.write_when_space(tmp_path, lambda: (_ for _ in ()).throw(ValueError("other")))


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    """On a real device that is always full."""
    with pytest.raises(OSError) as caught:
        files.append_line(Path("/dev/full"), "x")
    assert files.is_full(caught.value)
    file = tmp_path / "rows"
    files.append_line(file, "first")

    class Torn(str):
        def __add__(self, other):  # half a line reaches the file before the disk is full
            with open(file, "a") as lines:
                lines.write("sec")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError):
        files.append_line(file, Torn("second"))
    assert file.read_text() == "first\n"
