"""What held-out rows will show, said before training: as often as promised, from earlier runs where there are any."""

import numpy as np
import pytest

from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.power import deviations, power, rows_for, visible
from bizassist_nb.results.summary import run_text
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.run import RunDirectory


def compared(rows: int, change: float, spread: float, seed: int) -> records.Judged:
    """A comparison on rows of 10 tokens, which gain so much on average, and differ by so much."""
    gains = np.random.default_rng(seed).normal(change, spread, rows)
    base = [Score(row, 30.0, 10) for row in range(rows)]
    return judge(base, [Score(row, 30.0 + 10 * float(gain), 10) for row, gain in enumerate(gains)], seed=seed)


def differing(rows: int, spread: float) -> list[tuple[float, float]]:
    """So many rows of 10 tokens that differ by so much."""
    return deviations(compared(rows, -0.3, spread, seed=rows))


@pytest.mark.parametrize("draw", ["normal", "few gain much"])
@pytest.mark.parametrize("rows", [12, 64])
def test_four_of_five_sets_of_rows_show_the_fall_that_is_promised(rows, draw):
    """By the verdict itself, on rows drawn from where the earlier ones came from; real ones in tests/benchmarks."""
    random = np.random.default_rng(rows)
    gains = random.normal(0, 0.2, 20_000) if draw == "normal" else 0.2 * (1 - random.exponential(size=20_000))

    fall = visible(rows, [(10, gain) for gain in gains])
    base = [Score(row, 30.0, 10) for row in range(rows)]
    seen = 0
    for _ in range(300):
        tuned = [Score(row, 30.0 + 10 * (gain - fall), 10) for row, gain in enumerate(random.choice(gains, rows))]
        seen += judge(base, tuned, seed=0).verdict == "helped"
    assert seen / 300 == pytest.approx(0.8, abs=0.06)


def test_a_fall_within_the_margin_is_never_promised():
    assert visible(10_000, differing(64, 0.1)) == 0.02


@pytest.mark.parametrize("spread", [0.05, 0.2, 0.7])
def test_so_many_rows_show_so_small_a_fall(spread):
    differ = differing(64, spread)
    rows = rows_for(0.05, differ)
    assert rows == 12 or visible(rows, differ) <= 0.051 < visible(rows * 9 // 10 - 1, differ)


def test_rows_that_share_a_context_count_as_one():
    """Each four of 64 rows are copies, so 64 rows show no more than 16 that differ."""
    gains = np.random.default_rng(0).normal(0, 0.2, 16).repeat(4)
    base = [Score(row, 30.0, 10) for row in range(64)]
    tuned = [Score(row, 30.0 + 10 * float(gain), 10) for row, gain in enumerate(gains)]
    alone, shared = (
        judge(base, tuned, seed=0, groups=groups) for groups in (None, {n: str(n // 4) for n in range(64)})
    )
    assert visible(64, deviations(shared)) == pytest.approx(2 * visible(64, deviations(alone)), rel=0.1)


@pytest.fixture
def scored(tmp_path):
    """Make a run of a base on data in tmp_path, whose rows differ by so much."""

    def make(name: str, spread: float, *, rows: int = 64, **settings) -> RunDirectory:
        run = RunDirectory.create(tmp_path / name, Settings(**{"model": "smollm2-135m", **settings}))
        found = compared(rows, -0.3, spread, seed=len(name))
        write_json(run.path / "evaluation.json", assess(found, found, None))
        return run

    return make


def test_without_an_earlier_run_dollys_figures_are_taken_and_named(tmp_path):
    found = power(Settings(data="sample", runs_dir=str(tmp_path / "none")), "smollm2-135m", 64)
    assert found.sentence.startswith(f"With 64 test rows, a fall of {found.change:.2g} nats a token or more will be ")
    assert found.sentence.endswith(" rows (rows that differ as measured on Dolly with smollm2-135m)")


def test_earlier_runs_of_that_base_on_that_data_say_how_rows_differ(tmp_path, scored):
    settings = Settings(data="sample", runs_dir=str(tmp_path))
    scored("a", 0.1, data="sample")
    scored("dolly", 9.0, data="dolly")
    scored("other", 9.0, data="sample", model="other/base")
    scored("few", 9.0, data="sample", rows=11)
    damaged = scored("damaged", 9.0, data="sample")
    (damaged.path / "evaluation.json").write_text("{")
    found = power(settings, "smollm2-135m", 64)
    assert found.change == pytest.approx(visible(64, differing(64, 0.1)), rel=0.25)
    assert found.sentence.endswith("(rows that differ as in 1 earlier run on this data)")
    scored("wider", 0.5, data="sample")
    scored("widest", 0.9, data="sample")
    pooled = differing(64, 0.1) + differing(64, 0.5) + differing(64, 0.9)
    assert power(settings, "smollm2-135m", 64).change == pytest.approx(visible(64, pooled), rel=0.1)


def test_a_table_of_the_same_name_in_another_notebook_is_other_data(tmp_path, scored):
    scored("table", 9.0, data="{df}")
    found = power(Settings(data="{df}", runs_dir=str(tmp_path)), "smollm2-135m", 64)
    assert found.sentence.endswith("as measured on Dolly with smollm2-135m)")


def test_too_few_rows_promise_nothing(tmp_path):
    found = power(Settings(data="sample", runs_dir=str(tmp_path)), "smollm2-135m", 11)
    assert found.change is None
    assert found.sentence.startswith("With 11 test rows nobody can tell (at least 12 are needed); 0.05 nats take ")


def test_a_run_says_what_it_can_show(scored):
    run = scored("a", 0.1)
    Journal(run.path).write(records.Power(rows=64, change=0.07, sentence="With 64 test rows, a fall …"))
    assert "what it can show: With 64 test rows, a fall …" in run_text(run)
