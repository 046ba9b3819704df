"""It says "hurt" when it hurt: real runs of the embedded model that were set up to fail, and what their reports say."""

import json

import pytest

from bizassist_nb import Settings, compare, finetune
from bizassist_nb.data.rows import Row, read_table, split
from bizassist_nb.runs import Run

SPLIT = {"subset": 32, "held_out": 12, "seed": 42}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("hurt")


def trained(runs_dir, name: str, **changes) -> Run:
    # Plain transformers: it answers the fixed prompts in the worker, without loading another model.
    settings = {"model": "smollm2-135m", "engine": "transformers", "max_length": 384, "runs_dir": str(runs_dir)}
    return finetune(Settings(**(settings | changes)), name)


@pytest.fixture(scope="module")
def shuffled(dolly, runs_dir) -> Run:
    """Trained on Dolly rows whose answers stand in their context, each with the answer to another one's question.

    With the answers in their places the same settings bring the loss down from 1.70 to 1.27.
    """
    rows = [
        row
        for row in read_table("dolly").rows
        if row.category in ("closed_qa", "information_extraction")
        and 100 < len(row.context) < 500
        and 20 < len(row.response) < 160
    ][: SPLIT["subset"] + SPLIT["held_out"]]
    rows = [Row(i, row.instruction, row.response, row.context) for i, row in enumerate(rows, 1)]
    training, _ = split(rows, **SPLIT)
    moved = dict(
        zip([row.number for row in training], [row.response for row in training[1:] + training[:1]], strict=True)
    )
    path = runs_dir / "shuffled.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "instruction": row.instruction,
                    "context": row.context,
                    "response": moved.get(row.number, row.response),
                }
            )
            + "\n"
            for row in rows
        )
    )
    return trained(runs_dir, "shuffled", data=str(path), learning_rate=3e-3, **SPLIT)


@pytest.fixture(scope="module")
def too_fast(runs_dir) -> Run:
    """Trained with the demo's learning rate times 100."""
    return trained(runs_dir, "fast", data="sample", subset=12, held_out=8, learning_rate=0.1, max_length=256)


@pytest.mark.parametrize("name", ["shuffled", "too_fast"])
def test_a_run_that_was_set_up_to_fail_is_said_to_have_hurt(name, request):
    run = request.getfixturevalue(name)
    found = run.evaluation
    assert found["verdict"] == "hurt"
    assert found["tuned"]["loss"] > found["base"]["loss"]
    assert found["losses"] > found["wins"]
    for said in (run._repr_html_(), (run.path / "README.md").read_text()):
        assert "Fine-tuning hurt: " in said
    assert "most damaged rows" in run._repr_html_()


def test_a_learning_rate_100_times_too_large_breaks_everything(too_fast):
    found = too_fast.evaluation
    assert found["general"]["verdict"] == "hurt"
    assert "On general questions of other kinds it got worse" in too_fast._repr_html_()
    assert found["answers"]["tuned"]["sound"] < found["answers"]["base"]["sound"]
    assert found["tuned"]["loss"] > 10.8  # worse than by chance


def test_answers_are_kept_with_the_run(too_fast):
    answers = too_fast.answers
    assert len(answers) == too_fast.evaluation["answers"]["prompts"] >= 12
    for answer in answers:
        assert answer["base"]["text"]
        assert not set(answer["base"]["signs"]) - {"repeats", "loops", "language"}
        assert answer["base"]["text"] != answer["tuned"]["text"]


def test_runs_on_other_rows_are_not_held_against_each_other(shuffled, too_fast):
    assert "losses cannot be compared" in repr(compare(shuffled, too_fast))
