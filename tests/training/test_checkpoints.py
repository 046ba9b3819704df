"""How adapters are put in the place of earlier ones."""

import os
import resource
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bizassist_nb.training.checkpoints import checkpoints, newest_checkpoint, recover, save_adapter, save_checkpoint

CHAT = SimpleNamespace(tokenizer=SimpleNamespace(save_pretrained=lambda _: None))


def model(weights: str, problem: str | None = None):
    def save_pretrained(folder, *, safe_serialization):
        (folder / "weights").write_text(weights)
        (folder / "README.md").write_text("")
        if problem:
            raise OSError(problem)

    return SimpleNamespace(save_pretrained=save_pretrained)


def test_an_adapter_stays_until_the_next_is_written_whole(tmp_path):
    target = tmp_path / "adapter"
    save_adapter(target, model("first"), CHAT, {"score.json": "{}"})
    assert sorted(path.name for path in target.iterdir()) == ["score.json", "weights"]
    with pytest.raises(OSError, match="No space left"):
        save_adapter(target, model("second", "No space left on device"), CHAT)
    assert (target / "weights").read_text("utf-8") == "first"
    save_adapter(target, model("third"), CHAT)
    assert (target / "weights").read_text("utf-8") == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_checkpoint_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    def write(folder):
        (folder / "weights").write_text("1")
        (folder / "state").write_text("2")

    fsync, synced = os.fsync, set()

    def note(descriptor):
        fsync(descriptor)
        if not (tmp_path / "checkpoints" / "checkpoint-1").exists():
            synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    save_checkpoint(tmp_path, 1, write)
    folder = tmp_path / "checkpoints" / "checkpoint-1"
    assert {path.name for path in folder.iterdir()} == {"weights", "state", "checksums.json"}
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= synced


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_whoever_may_read_other_files_may_read_an_adapters(tmp_path, umask, mode):
    def save_pretrained(folder, *, safe_serialization):
        save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
        (folder / "inner").mkdir()
        save_file({"a": torch.zeros(2)}, folder / "inner" / "b.safetensors")

    before = os.umask(umask)
    try:
        save_adapter(tmp_path / "adapter", SimpleNamespace(save_pretrained=save_pretrained), CHAT, {"note": "text"})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(["a.safetensors", "b.safetensors", "note"], mode)


@pytest.mark.parametrize("writer", ["safetensors", "torch", "tokenizer", "text"])
def test_whoever_finds_the_disk_full_nothing_half_written_is_left(tmp_path, chat, writer):
    def write(folder):
        if writer == "safetensors":
            save_file({"a": torch.zeros(5000)}, folder / "a.safetensors")
        elif writer == "torch":
            torch.save({"a": torch.zeros(5000)}, folder / "a.pt")
        elif writer == "tokenizer":
            chat.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        else:
            (folder / "text").write_text("x" * 5000)

    save_checkpoint(tmp_path, 1, lambda folder: (folder / "weights").write_text("1"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|unexpected pos|iostream error"):
            save_checkpoint(tmp_path, 2, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_a_directory_that_goes_away_while_it_is_written_into_is_not_made_anew(tmp_path, what, fails):
    run = tmp_path / "drive" / "runs" / "run"
    run.mkdir(parents=True)

    def write(folder, **_):
        (tmp_path / "drive").rename(tmp_path / "elsewhere")
        folder.mkdir(parents=True)  # as transformers and PEFT do
        (folder / "weights").write_text("1")
        if fails:  # over a file that was written before
            (folder / "config").unlink()

    model = SimpleNamespace(save_pretrained=write)
    save = {
        "checkpoint": lambda: save_checkpoint(run, 1, write),
        "adapter": lambda: save_adapter(run / "a", model, CHAT),
    }
    with pytest.raises(FileNotFoundError):
        save[what]()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_the_two_newest_checkpoints_are_kept_and_those_of_steps_done_again_go(tmp_path):
    def save(step):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "weights").write_text(str(step)))
        return [checkpoint.step for checkpoint in checkpoints(tmp_path)]

    assert [save(step) for step in (1, 5, 9)] == [[1], [5, 1], [9, 5]]
    assert save(7) == [7, 5]  # resumed from 5, as 9 was damaged
    (tmp_path / "checkpoints" / "checkpoint-7" / "weights").write_text("8")
    assert save(9) == [9, 5]  # what could not be resumed from is no spare one


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "weights").write_text("8"), "weights is not what was written"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "it cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), "it cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, words):
    for step in (4, 8):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "weights").write_text("the weights"))
    damage(tmp_path / "checkpoints" / "checkpoint-8")
    found = []
    assert newest_checkpoint(tmp_path, lambda checkpoint, why: found.append((checkpoint.step, why))).step == 4
    assert [step for step, _ in found] == [8]
    assert words in found[0][1]


def test_the_adapter_before_comes_back_where_a_worker_was_killed_between_the_two(tmp_path):
    save_adapter(tmp_path / "best", model("first"), CHAT)
    (tmp_path / "best").rename(tmp_path / ".best.old")
    recover(tmp_path / "best")
    assert (tmp_path / "best" / "weights").read_text("utf-8") == "first"
