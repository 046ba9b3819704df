"""What is chosen from memory, shape and lengths, and what a run is said to need: arithmetic, on devices made up."""

import dataclasses
import functools

import pages
import pytest
from transformers import MistralConfig, MixtralConfig

from bizassist_nb import Settings
from bizassist_nb.api import Run
from bizassist_nb.core.errors import ModelError
from bizassist_nb.results.summary import run_html, run_text
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.records import Engine
from bizassist_nb.training import preflight
from bizassist_nb.training.preflight import Device, Placement, Shape

PADDED, PLAIN = Engine(name="unsloth", reason=""), Engine(name="transformers", reason="")
UNSLOTH = Engine(name="unsloth", reason="", end_to_end=True)
GRAPHS = Engine(name="transformers", reason="", graphs=True)
T4 = Device("cuda:0", (7, 5), 14.6)
H100 = Device("cuda:0", (9, 0), 79.0)
CPU = Device("cpu", (0, 0), 12.0)
MISTRAL = Shape.of(MistralConfig(vocab_size=32768))  # 7B v0.3
SMOL = Shape(layers=30, hidden=576, intermediate=1536, query=576, key_value=192, vocabulary=49152, tied=True)
DOLLY = [[992, 131, 107, 60], [300, 250, 120, 90], [180, 131, 131, 40]]
LONG = [[2048] * 4] * 3
MIXED = [*DOLLY * 20, [2048, 300, 200, 100]]


def chosen(on, lengths, engine=UNSLOTH, model=MISTRAL, **changes):
    settings = Settings(**changes)
    return preflight.choose(settings, Placement(model, settings.rank, engine, on), lengths)


@pytest.mark.parametrize(
    ("on", "engine", "lengths", "changes", "micro_batch", "checkpointing"),
    [
        (H100, UNSLOTH, DOLLY, {}, 4, False),
        (H100, UNSLOTH, LONG, {}, 4, False),
        (H100, UNSLOTH, [[2048] * 64], {"batch_size": 64}, 8, False),  # as many as can do without checkpointing
        (T4, UNSLOTH, DOLLY, {}, 4, False),
        (T4, PADDED, DOLLY, {}, 1, False),  # padding to the longest is arithmetic, too
        (T4, UNSLOTH, MIXED, {}, 4, True),  # few steps are as long as that, and only they are done twice
        (T4, UNSLOTH, LONG, {}, 1, False),  # so much arithmetic that doing it twice costs more than more launches
        (T4, UNSLOTH, LONG, {"rank": 64}, 4, True),
        (T4, UNSLOTH, LONG, {"micro_batch": 1}, 1, False),
        (T4, UNSLOTH, [[8192] * 4], {"max_length": 8192}, 4, True),
        (T4, PLAIN, DOLLY, {}, 1, False),
        (CPU, PLAIN, DOLLY, {}, 4, False),
    ],
)
def test_the_largest_micro_batch_that_fits_and_checkpointing_where_it_pays(
    on, engine, lengths, changes, micro_batch, checkpointing
):
    fit = chosen(on, lengths, engine, SMOL if on is CPU else MISTRAL, **changes)
    assert (fit.micro_batch, fit.checkpointing) == (micro_batch, checkpointing), fit.reason
    assert "GiB of" in fit.reason


@pytest.mark.parametrize(
    ("free", "lengths", "changes", "graphs", "unpacked"),
    [
        (79.0, DOLLY, {}, True, True),
        (24.0, DOLLY, {}, True, False),  # no room for 13 GiB of 16-bit weights
        (24.0, LONG, {"micro_batch": 4}, False, False),  # every step needs checkpointing
        (24.0, [*LONG, [100] * 4], {"micro_batch": 4}, True, False),  # one does not
        (79.0, DOLLY, {"dropout": 0.1}, False, False),
    ],
)
def test_graphs_where_passes_have_room_and_weights_in_16_bits_where_there_is_more(
    free, lengths, changes, graphs, unpacked
):
    on = Device("cuda:0", (9, 0), free)
    fit, expected = preflight.estimate(Placement(MISTRAL, 16, GRAPHS, on), Settings(**changes), lengths)
    assert (fit.graphs, fit.unpacked) == (graphs, unpacked), fit.reason
    assert ("unpacked weights" in expected.parts) is unpacked
    assert expected.peak < free
    assert not chosen(on, lengths, PLAIN, **changes).graphs


def test_a_graph_has_room_for_its_rows_and_little_more():
    for tokens in range(1, 2049):
        assert tokens <= preflight.padded(tokens) < tokens + 64


@pytest.mark.parametrize(
    ("on", "precision"),
    [(T4, "float16"), (Device("cuda:0", (8, 0), 40.0), "bfloat16"), (H100, "bfloat16"), (CPU, "float32")],
)
def test_precision_follows_the_compute_capability(on, precision):
    assert chosen(on, DOLLY).precision == precision


@pytest.mark.parametrize("batch_size", [1, 4, 6, 12])
@pytest.mark.parametrize("free", [5.5, 7.0, 9.0, 14.6, 40.0])
@pytest.mark.parametrize("engine", [UNSLOTH, PLAIN], ids=["unsloth", "transformers"])
def test_what_is_chosen_divides_the_step_and_fits_for_the_longest_rows(batch_size, free, engine):
    on = Device("cuda:0", (7, 5), free)
    lengths = [([2000, 900, 100] * 4)[:batch_size]] * 2
    fit, expected = preflight.estimate(Placement(MISTRAL, 16, engine, on), Settings(batch_size=batch_size), lengths)
    assert batch_size % fit.micro_batch == 0
    assert ("would fit" in fit.reason) == (free == 5.5)
    assert expected.peak < free


def test_more_memory_never_takes_longer():
    def seconds(free):
        on = Device("cuda:0", (7, 5), free)
        return Placement(MISTRAL, 16, UNSLOTH, on).work(LONG, chosen(on, LONG))

    took = [seconds(free) for free in (5.5, 6.0, 8.0, 10.0, 14.0, 20.0, 30.0, 60.0)]
    assert took == sorted(took, reverse=True)
    assert took[-1] < took[0]


def test_only_steps_without_room_for_their_activations_are_done_twice():
    fit = chosen(T4, MIXED)
    assert fit.checkpoint_above == sum(DOLLY[0])  # the longest of the others
    assert [preflight.checkpointed_in(fit, step, UNSLOTH) for step in MIXED] == [False] * 60 + [True]
    assert preflight.checkpointed_in(fit, [fit.checkpoint_above + 1], UNSLOTH)
    assert not preflight.checkpointed_in(fit, [fit.checkpoint_above], UNSLOTH)
    room = Placement(MISTRAL, 16, UNSLOTH, T4).peak(DOLLY[0], checkpointing=False)
    assert sum(room.values()) < T4.free
    _, expected = preflight.estimate(Placement(MISTRAL, 16, UNSLOTH, T4), Settings(), MIXED)
    assert expected.peak == pytest.approx(sum(room.values()))  # fuller than the longest step, which checkpoints
    never = chosen(H100, MIXED)
    assert not any(preflight.checkpointed_in(never, step, UNSLOTH) for step in MIXED)


def test_short_rows_beside_a_long_one_in_every_step_spare_none_of_them():
    on = Device("cuda:0", (7, 5), 14.5)
    for size in ("auto", 1, 2):
        settings = Settings(max_length=8192, micro_batch=size)
        fit, expected = preflight.estimate(Placement(MISTRAL, 16, UNSLOTH, on), settings, [[6000, 300, 200, 100]] * 3)
        assert fit.checkpointing
        assert fit.checkpoint_above == 0
        assert expected.peak < on.free


def test_what_cannot_fit_names_a_length_that_does():
    on = Device("cuda:0", (7, 5), 6.2)
    fit = chosen(on, [[8192] * 4], PLAIN, max_length=8192)
    assert (fit.micro_batch, fit.checkpointing) == (1, True)
    most = Placement(MISTRAL, 16, PLAIN, on).longest_that_fits()
    assert f"max_length = {most} would fit" in fit.reason
    assert "would fit" not in chosen(on, [[most] * 4], PLAIN).reason
    assert "too large for this device" in chosen(Device("cuda:0", (7, 5), 3.0), DOLLY).reason


def test_rows_count_in_the_ram_once_however_many_epochs_they_are_in():
    place = Placement(MISTRAL, 16, PLAIN, H100)
    ram = [preflight.estimate(place, Settings(), DOLLY * times)[1].ram for times in (1, 1001)]
    more = 1000 * sum(map(sum, DOLLY)) * 64 / 2**30
    assert ram[1] - ram[0] == pytest.approx(more)
    twice = preflight.estimate(place, Settings(epochs=2), DOLLY * 2002)[1].ram
    assert twice == pytest.approx(ram[1])


def test_rows_are_dealt_longest_first_to_the_rank_with_the_fewest_tokens():
    deal = functools.partial(preflight.deal, tokens=int)
    assert deal([50, 600, 80, 400, 100, 300, 150, 200], 2) == [[600, 200, 100, 50], [400, 300, 150, 80]]
    assert deal([9, 1, 1, 1], 2) == [[9, 1], [1, 1]]  # as many rows each, whatever their tokens
    assert deal([5, 2, 2], 2) == [[5], [2, 2]]
    assert deal([5], 3) == [[5], [], []]
    assert deal([1, 3, 2], 1) == [[3, 2, 1]]


def test_of_several_ranks_each_share_has_to_fit_and_the_longest_counts():
    steps = [[900, 500, 400, 100], [300]]
    two, one = (Placement(MISTRAL, 16, GRAPHS, H100, ranks) for ranks in (2, 1))
    assert two.dealt(steps) == [[900, 100], [500, 400], [300], [1]]
    fit, expected = preflight.estimate(two, Settings(), steps)
    assert fit.micro_batch == 2
    half = one.work([[900, 100], [300]], fit)
    assert half < expected.seconds < 1.1 * half  # and what the two exchange
    assert expected.seconds < preflight.estimate(one, Settings(), steps)[1].seconds


def test_where_more_gpus_take_no_less_time_that_is_said_before_training():
    steps = [[200] * 4] * 20

    def said(engine, ranks=2, **changes):
        on = dataclasses.replace(H100, sharing=changes.pop("sharing", 1))
        place = Placement(MISTRAL, 16, engine, on, ranks)
        return preflight.estimate(place, Settings(**changes), steps)[0].reason

    assert "GPUs" not in said(GRAPHS)
    assert "; 2 GPUs take no less time than one (" in said(UNSLOTH)
    assert "they pay from batch_size = 16 on" in said(UNSLOTH)  # kernels are launched in the time of 2,000 tokens
    assert "GPUs" not in said(UNSLOTH, ranks=1)
    assert "GPUs" not in said(PLAIN, sharing=2)


def test_a_step_goes_through_with_its_longest_rows_first():
    assert list(preflight.micro_batches([5, 900, 7, 800, 6], 2)) == [[900, 800], [7, 6], [5]]
    steps = [[100, 90, 10, 10], [60, 60, 60, 60]]
    assert preflight.largest(steps, 2, PLAIN)[-1] == [100, 90]  # padded: 200 tokens
    assert preflight.largest(steps, 4, PLAIN)[-1] == [100, 90, 10, 10]  # 400, of which 190 are padding
    assert preflight.largest(steps, 4, UNSLOTH)[-1] == [60, 60, 60, 60]  # laid end to end: 240 against 210
    assert preflight.largest(steps, 4, GRAPHS)[-1] == [60, 60, 60, 60]
    assert preflight.largest(steps, 4, GRAPHS, checkpointing=True)[-1] == [100, 90, 10, 10]  # not through a graph


@pytest.mark.parametrize("size", [1, 4, 7, 12])
def test_divisors_are_all_there_largest_first(size):
    assert preflight.divisors(size) == sorted((n for n in range(1, size + 1) if size % n == 0), reverse=True)


@pytest.mark.parametrize("engine", [UNSLOTH, PLAIN], ids=["unsloth", "transformers"])
@pytest.mark.parametrize("on", [T4, H100, CPU], ids=["T4", "H100", "CPU"])
def test_peak_grows_with_rank_and_rows_and_shrinks_with_checkpointing(engine, on):
    def need(rank=16, rows=(512,) * 4, checkpointing=False):
        return Placement(MISTRAL, rank, engine, on).need(rows, checkpointing=checkpointing)

    assert need(rank=64) > need()
    assert need(rows=(512,) * 8) > need()
    assert need(rows=(1024,) * 4) > need()
    assert need(checkpointing=True) < need()


def test_counts_are_those_of_the_models():
    assert MISTRAL.adapter(16) == 41_943_040  # as the notebook that this package grew out of printed
    assert MISTRAL.linear + MISTRAL.embeddings == pytest.approx(7.248e9, rel=1e-3)
    assert SMOL.adapter(16) == 4_884_480
    assert SMOL.linear + SMOL.embeddings == pytest.approx(134.5e6, rel=1e-3)


def test_shape_of_the_embedded_model(embedded):
    assert preflight.shape(str(embedded)) == SMOL


def test_a_config_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match=str(tmp_path)):
        preflight.shape(str(tmp_path))


def test_a_mixture_of_experts_is_refused_by_name(tmp_path):
    MixtralConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"mixtral is a mixture of experts \(num_local_experts = 8\)"):
        preflight.shape(str(tmp_path))


def test_estimate_before_anything_is_loaded():
    place = Placement(MISTRAL, 16, UNSLOTH, T4)
    long, seen = (preflight.estimate(place, Settings(), lengths)[1] for lengths in ([[1024] * 4] * 250, DOLLY))
    assert long.peak > seen.peak > sum(seen.parts[name] for name in ("weights", "adapter"))
    assert long.seconds is not None
    assert long.seconds > 60
    assert f"about {seen.peak:.1f} GiB of GPU memory of 14.6 free" in seen.sentence
    for word in ("weights", "adapter", "activations", "scratch", "of RAM", "of disk", "of training"):
        assert word in seen.sentence
    assert seen.ram < 12.7  # what a free Colab has
    assert seen.peak < 14.6


def test_the_choice_and_its_reason_stand_in_the_views(tmp_path):
    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    journal = Journal(tmp_path)
    fit, expected = preflight.estimate(Placement(MISTRAL, 16, UNSLOTH, T4), Settings(), DOLLY)
    journal.write(records.Preflight(sentence=expected.sentence))
    journal.write(records.Fit(step=0, micro_batch=4, checkpointing=False, precision="float16", reason=fit.reason))
    journal.write(records.Fit(step=7, micro_batch=1, checkpointing=True, precision="float16", reason="memory ran out"))
    journal.write(
        records.Fit(
            step=8, micro_batch=1, checkpointing=True, precision="float16", reason="long", checkpoint_above=2112
        )
    )
    page = pages.read(run_html(Run(tmp_path)))
    for shown in (run_text(Run(tmp_path)), page):
        assert expected.sentence in shown
        assert f"4 rows at once, checkpointing off, float16 ({fit.reason})" in shown
        assert "from step 8 on 1 row at once, checkpointing on, float16 (memory ran out)" in shown
        assert "1 row at once, checkpointing where more than 2,112 tokens go through at once, float16 (long)" in shown


@pytest.mark.parametrize(
    ("asked", "hidden", "rate", "why"),
    [
        ("auto", 4096, 2e-4, "auto, from the model's hidden size of 4,096"),  # QLoRA's for 7B
        ("auto", 8192, 1.2e-4, "auto, from the model's hidden size of 8,192"),  # QLoRA's for 65B is 1e-4
        ("auto", 576, 9.3e-4, "auto, from the model's hidden size of 576"),
        (1e-3, 4096, 1e-3, "asked for"),
    ],
)
def test_the_learning_rate_follows_the_width_of_the_model_unless_it_is_set(tmp_path, asked, hidden, rate, why):
    run = Run.create(tmp_path / "r", Settings(learning_rate=asked))
    found = preflight.learning_rate(run, dataclasses.replace(SMOL, hidden=hidden))
    assert (found.learning_rate, found.reason) == (rate, why)
    Journal(run.path).write(found)
    assert preflight.learning_rate(run, MISTRAL) == run.last(records.Rate)  # a resumed run keeps its own
    assert f"learning rate: {rate:g} ({why})" in run_text(run)
    assert f"learning_rate = {rate}" in run_html(run)
