"""It says "hurt" when it hurt: real runs of the embedded model that were set up to fail, and what their reports say."""

import json

import pages
import pytest
from live_kernel import wait_until

from bizassist_nb import Settings, compare
from bizassist_nb.api import Run
from bizassist_nb.data.rows import Row, read_table, split
from bizassist_nb.runs.run import ENDED
from bizassist_nb.training.launch import start

pytestmark = pytest.mark.slow

SPLIT = {"subset": 32, "held_out": 12, "seed": 42}


@pytest.fixture(scope="module")
def narrow(dolly, tmp_path_factory) -> Run:
    """Trained on rows of one narrow kind: "Identify which instrument is string or woodwind: Panduri, Zurna"."""
    folder = tmp_path_factory.mktemp("narrow")
    rows = [
        row for row in read_table("dolly").rows if row.instruction.startswith("Identify which instrument is string")
    ]
    texts = [{"instruction": row.instruction, "response": row.response} for row in rows[:60]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    changes = {"data": str(folder / "rows.jsonl"), "subset": 32, "held_out": 16, "learning_rate": 6e-3, "epochs": 4}
    run = begin(folder, "narrow", **changes, max_length=128)
    wait_until(lambda: run.status in ENDED, timeout=1200)
    return run


def test_a_run_on_one_narrow_kind_of_rows_helped_at_a_cost(narrow):
    found = narrow.evaluation
    assert found.verdict == "helped, at a cost"
    assert found.difference < -0.5
    assert found.general.verdict == "hurt"
    assert "On general questions of other kinds it got worse" in pages.read(narrow._repr_html_())
    assert found.forgetting.right_to_wrong > found.forgetting.wrong_to_right


def test_a_run_says_whether_a_prompt_with_examples_would_have_done(narrow):
    found = narrow.evaluation
    assert found.prompted.base.loss < found.base.loss - 0.5  # examples of that kind do help
    assert found.prompted.tuned == found.tuned
    assert "), beyond a prompt with 3 examples: −0." in found.sentence
    assert found.forgetting.kl_held_out > found.forgetting.kl_general > 0


@pytest.fixture(scope="module")
def runs(dolly, tmp_path_factory) -> dict[str, Run]:
    """Both, trained at the same time on one core each; the second with 100 times the learning rate of the demo."""
    folder = tmp_path_factory.mktemp("hurt")
    fast = {"data": "sample", "subset": 12, "held_out": 12, "learning_rate": 0.1, "max_length": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        found = {
            name: begin(folder, name, **changes)
            for name, changes in (("shuffled", from_context(folder, 1)), ("fast", fast))
        }
    wait_until(lambda: all(run.status in ENDED for run in found.values()), timeout=1200)
    return found


def begin(folder, name: str, **changes) -> Run:
    # Plain transformers: it answers the fixed prompts in the worker, without loading another model.
    settings = {"model": "smollm2-135m", "engine": "transformers", "max_length": 384, "runs_dir": str(folder)}
    return Run(start(Settings(**(settings | changes)), name).path)


def from_context(folder, moved: int) -> dict[str, object]:
    """Settings to train on Dolly rows whose answers stand in their context, each answer moved on by so many rows.

    Not moved at all, they bring held-out loss down from 1.70 to 1.27.
    """
    rows = [
        row
        for row in read_table("dolly").rows
        if row.category in ("closed_qa", "information_extraction")
        and 100 < len(row.context) < 500
        and 20 < len(row.response) < 160
    ][: 2 * SPLIT["subset"]]
    rows = [Row(i, row.instruction, row.response, row.context) for i, row in enumerate(rows, 1)]
    training, _ = split(rows, **SPLIT)
    answers = {row.number: training[(i + moved) % len(training)].response for i, row in enumerate(training)}
    texts = [
        {"instruction": row.instruction, "context": row.context, "response": answers.get(row.number, row.response)}
        for row in rows
    ]
    path = folder / f"moved-{moved}.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return {"data": str(path), "learning_rate": 3e-3, **SPLIT}


@pytest.mark.parametrize("name", ["shuffled", "fast"])
def test_a_run_that_was_set_up_to_fail_is_said_to_have_hurt(runs, name):
    run = runs[name]
    found = run.evaluation
    assert found.verdict == "hurt"
    assert found.tuned.loss > found.base.loss
    assert found.losses > found.wins
    for said in (run._repr_html_(), (run.path / "README.md").read_text("utf-8")):
        assert "Fine-tuning hurt: " in said
    assert "most damaged rows" in run._repr_html_()


def test_a_learning_rate_100_times_too_large_breaks_everything(runs):
    found = runs["fast"].evaluation
    assert found.general.verdict == "hurt"
    assert "On general questions of other kinds it got worse" in pages.read(runs["fast"]._repr_html_())
    assert found.answers.tuned["sound"] < found.answers.base["sound"]
    assert found.tuned.loss > 10.8  # worse than by chance


def test_answers_are_kept_with_the_run(runs):
    answers = runs["fast"].answers
    assert len(answers) == runs["fast"].evaluation.answers.prompts >= 12
    for answer in answers:
        assert answer.base.text
        assert not set(answer.base.signs) - {"repeats", "loops", "language"}
        assert answer.base.text != answer.tuned.text


def test_runs_on_other_rows_are_not_held_against_each_other(runs):
    assert "losses cannot be compared" in repr(compare(*runs.values()))
