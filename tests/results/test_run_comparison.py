"""Runs beside one another, made of files alone: the table, what is said of two runs, and the plot of them all."""

import pytest
from random_run import environment

from bizassist_nb import compare
from bizassist_nb.api import Run
from bizassist_nb.core.errors import RunError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.loss_plot import loss_figure
from bizassist_nb.results.run_comparison import runs_section
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal


@pytest.fixture
def make(tmp_path):
    def make(name: str, tuned: float, *, tokens: int = 10, fingerprint: str = "f", rows=range(30), **settings) -> Run:
        path = tmp_path / name
        path.mkdir()
        (path / "settings.toml").write_text(Settings(data="sample", **settings).to_toml())
        write_json(path / "environment.json", environment("smollm2-135m", fingerprint))
        base = [Score(i, 3.0 * tokens + i % 3, tokens) for i in rows]
        found = judge(base, [Score(i, tuned * tokens + i % 4, tokens) for i in rows], seed=0)
        write_json(path / "evaluation.json", assess(found, found, None))
        journal = Journal(path)
        journal.write(records.Plan(steps=2))
        for step in (1, 2):
            event = {"learning_rate": 1e-4, "gradient_norm": 1.0, "tokens": 500, "seconds": 50.0}
            journal.write(records.Step(step=step, loss=tuned + 1 / step, **event))
        journal.write(records.Evaluation(who="base", step=0, loss=3.0))
        journal.write(records.Evaluation(who="tuned", step=2, loss=tuned))
        journal.write(records.Memory(of="process", peak=3 * 2**30))
        journal.write(records.State(state="finished"))
        return Run(path)

    return make


def test_the_table_shows_what_differs_and_what_came_of_it(make):
    section = runs_section([make("one", 2.0, rank=8), make("two", 2.9, rank=32, epochs=2)])
    rows = [dict(zip(section.head, row, strict=True)) for row in section.rows]
    assert [(row["run"], row["rank"], row["epochs"], row["steps"]) for row in rows] == [
        ("one", "8", "1", "2/2"),
        ("two", "32", "2", "2/2"),
    ]
    assert "seed" not in section.head
    assert (rows[0]["model"], rows[0]["data"], rows[0]["status"]) == ("smollm2-135m", "sample", "finished")
    assert (rows[0]["training time"], rows[0]["tokens/s"], rows[0]["memory"]) == ("2 min", "10", "3.0 GiB")
    assert rows[0]["verdict"] == "helped"
    assert float(rows[0]["change"]) == pytest.approx(
        float(rows[0]["tuned"]) - float(rows[0]["held-out loss: base"]), abs=2e-3
    )


def test_a_run_that_has_only_begun_has_its_place_too(make, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "settings.toml").write_text(Settings().to_toml())
    text = repr(runs_section([make("one", 2.0), Run(tmp_path / "new")]))
    assert "0/?" in text
    assert "lost" in text
    assert repr(runs_section([])) == "no runs yet"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"tuned": 1.5}, "two against one: better (-0.500 nats per answer token, 95 % interval -0.500 to -0.500"),
        ({"tuned": 2.5}, "two against one: worse (+0.500"),
        ({"tuned": 2.0}, "two against one: no practical difference (+0.000"),
        ({"tuned": 1.5, "rows": range(10, 40)}, "on the same 20 held-out rows"),
        ({"tuned": 1.5, "rows": range(29, 50)}, "losses cannot be compared"),
        ({"tuned": 2.0, "tokens": 12}, "losses cannot be compared"),
        ({"tuned": 2.0, "fingerprint": "g"}, "losses cannot be compared"),
    ],
)
def test_runs_are_held_against_the_first_where_they_share_their_rows(make, other, words):
    assert words in repr(compare(make("one", 2.0), make("two", **other)))


def test_runs_not_scored_are_said_to_be(make):
    one, two = make("one", 2.0), make("two", 2.0)
    (two.path / "evaluation.json").unlink()
    assert "two against one: not both have been scored" in repr(compare(one, two))


def test_runs_are_found_by_name(make, tmp_path, monkeypatch):
    make("one", 2.0)
    (tmp_path / "runs").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "one" in repr(compare("one"))
    with pytest.raises(RunError, match="there is no run 'nosuch'"):
        compare("one", "nosuch")
    with pytest.raises(RunError, match="which runs"):
        compare()


def test_the_comparison_is_static_html_with_one_plot(make):
    html = compare(make("one", 2.0), make("two", 2.5))._repr_html_()
    assert html.count("<img ") == 1
    assert 'alt="loss curves of one, two" src="data:image/png;base64,' in html
    assert "<script" not in html
    assert "two against one: worse" in html


def test_each_run_has_its_curves_in_the_plot(make):
    runs = [make(f"run{i}", 2.0 + i / 10) for i in range(9)]
    (axes,) = loss_figure(*runs).axes
    assert [text.get_text() for text in axes.figure.legends[0].texts] == [run.name for run in runs]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [0, 2]] * 9
    assert loss_figure()._repr_png_().startswith(b"\x89PNG")
