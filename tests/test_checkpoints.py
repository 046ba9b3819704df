"""How adapters are put in the place of earlier ones."""

from types import SimpleNamespace

import pytest

from bizassist_nb.training.checkpoints import save_adapter

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
    assert (target / "weights").read_text() == "first"
    save_adapter(target, model("third"), CHAT)
    assert (target / "weights").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
