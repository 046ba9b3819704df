"""Scores of held-out answers, against a forward pass and a logarithm of its own."""

import contextlib
import dataclasses
from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest
import torch
from random_run import environment, random_run
from transformers import AutoModelForCausalLM

from bizassist_nb.api import Run
from bizassist_nb.assistant import prefix_cache
from bizassist_nb.core.errors import DataError, ModelError, RunError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import read_table
from bizassist_nb.data.tokens import IGNORED, Example
from bizassist_nb.models.adapters import WEIGHTS
from bizassist_nb.results.verdict import mean_loss
from bizassist_nb.runs import records
from bizassist_nb.runs.rows import rows_of
from bizassist_nb.training import evaluation, scoring
from bizassist_nb.training.evaluation import EvaluationSet, evaluate
from bizassist_nb.training.scoring import pairs, score


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Torch's threads wait for each other by spinning, which beside other busy processes takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# In float64, so that a tight bound holds on any CPU: torch sums up 49,152 exponentials in float32, and the logarithm of
# that is up to 2e-5 nats off with AVX2, 7e-6 with AVX-512.
@pytest.fixture(scope="module")
def model(embedded):
    return AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def small(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()


def some_examples(chat, train_on: str = "response") -> list[Example]:
    """Sample rows cut to four lengths, and sorted neither by length nor by number, as a shuffle leaves them."""
    rows = read_table("sample").rows
    chosen = [
        dataclasses.replace(rows[i], response=rows[i].response[:end])
        for i, end in ((9, 140), (80, 40), (5, 200), (40, 90))
    ]
    found, _ = chat.examples(chosen, system_prompt="Be brief.", max_length=500, train_on=train_on)
    assert len({len(example.input_ids) for example in found}) == 4
    return found


@pytest.fixture(params=["response", "all"])
def examples(tiny_chat, request) -> list[Example]:
    return some_examples(tiny_chat, request.param)


@torch.inference_mode()
def plain_nats(model, example: Example) -> float:
    """Summed negative log-likelihood of the labels, from one unpadded pass over the row, in float64."""
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    nats = 0.0
    for position, label in enumerate(example.labels[1:]):
        if label != IGNORED:
            nats -= float(logits[position].log_softmax(dim=0)[label])
    return nats


def test_scores_agree_with_a_plain_forward_pass(model, chat):
    examples = some_examples(chat)
    scores = score(model, examples, pad_id=chat.pad_id)
    for example, scored in zip(examples, scores, strict=True):
        assert scored.nats / scored.tokens == pytest.approx(plain_nats(model, example) / scored.tokens, abs=1e-5)
    assert mean_loss(scores) < 5  # by chance it were 10.8: the model does know its language


@pytest.mark.slow
def test_scores_in_float32_are_as_exact_as_its_arithmetic(embedded, chat):
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    examples = some_examples(chat)
    for example, scored in zip(examples, score(model, examples, pad_id=chat.pad_id), strict=True):
        assert scored.nats / scored.tokens == pytest.approx(plain_nats(model, example) / scored.tokens, abs=2e-4)


def test_scores_come_in_the_order_given_with_the_tokens_they_are_over(small, tiny_chat, examples):
    scores = score(small, examples, pad_id=tiny_chat.pad_id)
    assert [one.row for one in scores] == [example.number for example in examples]
    assert [one.category for one in scores] == [example.category for example in examples]
    for example, scored in zip(examples, scores, strict=True):
        # The first token of a row is predicted by nothing.
        assert scored.tokens == example.trained_tokens - (example.labels[0] != IGNORED)
        assert scored.nats == pytest.approx(plain_nats(small, example), rel=1e-6)


def test_batches_do_not_change_scores(small, tiny_chat, examples):
    together = [one.nats for one in score(small, examples, pad_id=tiny_chat.pad_id)]
    one_by_one = [score(small, [example], pad_id=tiny_chat.pad_id)[0].nats for example in examples]
    assert one_by_one == pytest.approx(together, rel=1e-9)


def test_batches_hold_every_row_once_and_few_tokens(examples):
    examples += [Example(i, [5] * size, [5] * size, truncated=False) for i, size in enumerate([9, 4000, 5000, 9])]
    batches = scoring.batches_of(examples, 4096)
    assert sorted(index for batch in batches for index in batch) == list(range(len(examples)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(examples[i].input_ids) for i in batch) <= 4096
    assert len(batches) < len(examples)


def test_what_the_row_is_padded_with_does_not_matter(small, tiny_chat, examples):
    nats = [one.nats for one in score(small, examples, pad_id=tiny_chat.pad_id)]
    assert [one.nats for one in score(small, examples, pad_id=777)] == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_in_the_mode_it_was_in(small, tiny_chat, examples, training):
    small.train(training)
    score(small, examples, pad_id=tiny_chat.pad_id)
    assert small.training is training


def test_a_stop_between_batches_ends_the_scoring_and_restores_the_mode(small, tiny_chat, examples, monkeypatch):
    monkeypatch.setattr(scoring, "_BATCH_LOGITS", 1)
    seen = []

    def stop_at_third():
        seen.append(small.training)
        if len(seen) == 3:
            raise KeyboardInterrupt

    small.train()
    with pytest.raises(KeyboardInterrupt):
        score(small, examples, pad_id=tiny_chat.pad_id, between=stop_at_third)
    assert seen == [False, False, False]
    assert small.training
    small.eval()


@pytest.fixture
def room(small):
    """Room in memory for so many `tokens` at once; `tried` and `read` say how many rows and tokens each pass had."""
    room = SimpleNamespace(tokens=10**6, tried=[], read=[])

    def check(_module, _arguments, named):
        room.tried.append(named["input_ids"].shape[0])
        room.read.append(named["input_ids"].numel())
        if named["input_ids"].numel() > room.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    handle = small.register_forward_pre_hook(check, with_kwargs=True)
    yield room
    handle.remove()


def test_where_memory_runs_out_fewer_rows_are_scored_at_once(small, tiny_chat, room):
    examples = some_examples(tiny_chat)
    whole = score(small, examples, pad_id=tiny_chat.pad_id)
    room.tokens, room.tried = 2 * max(len(example.input_ids) for example in examples), []
    scores = score(small, examples, pad_id=tiny_chat.pad_id)
    assert [(one.row, one.tokens) for one in scores] == [(one.row, one.tokens) for one in whole]
    assert [one.nats for one in scores] == pytest.approx([one.nats for one in whole], rel=1e-5)
    assert room.tried == [1, 4, 2, 2]  # what all begin with, and the rows


def test_a_row_that_there_is_no_room_for_alone_ends_the_scoring(small, tiny_chat, room):
    room.tokens = 30  # enough for what all begin with
    with pytest.raises(torch.OutOfMemoryError):
        score(small, some_examples(tiny_chat), pad_id=tiny_chat.pad_id)
    assert room.tried == [1, 4, 2, 1]


def test_a_runs_rows_are_those_it_began_with(tmp_path, rows_file):
    data = rows_file([{"instruction": f"Question {i}?", "response": f"Answer {i}."} for i in range(9)])
    (tmp_path / "settings.toml").write_text(Settings(data=str(data), subset=6, held_out=3).to_toml())
    run = Run(tmp_path)
    table, training, held_out = rows_of(run)
    assert sorted(row.number for row in [*training, *held_out]) == list(range(1, 10))
    write_json(tmp_path / "environment.json", environment("smollm2-135m", table.fingerprint))
    assert rows_of(run) == (table, training, held_out)
    rows_file([{"instruction": f"Other question {i}?", "response": f"Answer {i}."} for i in range(9)])
    with pytest.raises(RunError, match=r"has changed since it began .*bring the old data back"):
        rows_of(run)


def test_a_run_of_an_older_version_keeps_its_rows(tmp_path, rows_file):
    """0.1.0 drew training rows first; scored on rows drawn otherwise, some of them would have been trained on."""
    data = rows_file([{"instruction": f"Question {i}?", "response": f"Answer {i}."} for i in range(20)])
    (tmp_path / "settings.toml").write_text(Settings(data=str(data), subset=6, held_out=3).to_toml())
    run = Run(tmp_path)
    table, *_ = rows_of(run)
    old = msgspec.to_builtins(environment("smollm2-135m", table.fingerprint))
    del old["split"]
    write_json(tmp_path / "environment.json", old)
    _, training, held_out = rows_of(run)
    assert [row.number for row in training] == [20, 6, 15, 5, 10, 14]
    assert [row.number for row in held_out] == [16, 19, 7]


def test_a_run_that_cannot_be_scored_is_refused_before_its_base_is_loaded(tiny, tmp_path, rows_file, monkeypatch):
    def loaded_base(_model):
        raise AssertionError("the base is loaded")

    monkeypatch.setattr(evaluation, "loaded_base", loaded_base)
    data = rows_file([{"instruction": f"Question {i}?", "response": f"Answer {i}."} for i in range(9)])
    run = random_run(tmp_path / "r", tiny, data=str(data), subset=6, held_out=3)
    data.unlink()
    with pytest.raises(DataError, match="there is no file"):
        evaluate(run)
    (run.adapter / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="is missing"):
        evaluate(run)
    (run.adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="the run 'r' has no adapter"):
        evaluate(run)


@pytest.mark.parametrize("max_length", [64, 2048])
def test_the_general_rows_are_the_same_whole_ones_for_every_run(small, tiny_chat, max_length):
    rows = list(read_table("sample").rows[:4])
    settings = Settings(max_length=max_length, system_prompt="Be brief.")
    evaluation_set = EvaluationSet(tiny_chat, settings, rows[2:], (rows[:2], rows[:2]))
    assert len(evaluation_set.general) == 50
    assert not any(example.truncated for example in evaluation_set.general)
    assert set(Counter(example.category for example in evaluation_set.general).values()) == {5}
    scores = evaluation_set.compare(small, contextlib.nullcontext)
    assert [one.base.row for one in scores.test] == [row.number for row in rows[:2]]
    found = evaluation_set.result(scores, None)
    assert [row.question for row in found.rows] == [row.instruction for row in rows[:2]]
    assert "Nadia" in found.general.rows[0].question
    assert found.forgetting == records.Forgetting(
        kl_held_out=0.0, kl_general=0.0, right_to_wrong=0, wrong_to_right=0, questions=23
    )


@contextlib.contextmanager
def _half(model):
    """The model with its output halved: another model, as base and tuned are."""
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
        try:
            yield
        finally:
            model.model.norm.weight.mul_(2)


def test_pairs_have_the_scores_of_each_and_how_far_they_are_apart(small, tiny_chat):
    examples = some_examples(tiny_chat)
    with _half(small):
        halved = score(small, examples, pad_id=tiny_chat.pad_id)
    whole = score(small, examples, pad_id=tiny_chat.pad_id)
    found = pairs(small, lambda: _half(small), examples, pad_id=tiny_chat.pad_id)
    assert ([one.base for one in found], [one.tuned for one in found]) == (halved, whole)
    for example, one in zip(examples, found, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([example.input_ids])
            after = small(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            with _half(small):
                before = small(input_ids=ids).logits[0].double().log_softmax(dim=-1)
        places = [place for place, label in enumerate(example.labels[1:]) if label != IGNORED]
        apart = torch.nn.functional.kl_div(after[places], before[places], log_target=True, reduction="sum")
        assert one.divergence == pytest.approx(float(apart), rel=1e-6)
        assert one.divergence > 0
        for logits, likeliest in zip((before, after), one.likeliest, strict=True):
            assert likeliest == [int(logits[place].argmax()) == example.labels[place + 1] for place in places]


def test_the_prompted_base_is_scored_on_the_same_answers_and_its_prompt_is_read_once(
    small, tiny_chat, room, monkeypatch
):
    """With the keys and values of what all rows begin with, to the scores of whole rows."""
    rows = list(read_table("sample").rows[:12])
    settings = Settings(max_length=200, system_prompt="Be brief.")
    evaluation_set = EvaluationSet(tiny_chat, settings, rows[4:], (rows[:4], rows[:4]))
    reused = evaluation_set.compare(small, contextlib.nullcontext).prompted
    read = sum(room.read[-2:])  # of the examples, and of what follows them in each row
    monkeypatch.setattr(prefix_cache, "read", lambda *_: [])  # as for models that cannot go on from what was read
    whole = evaluation_set.compare(small, contextlib.nullcontext).prompted
    assert read < 0.6 * room.read[-1]
    assert [one.nats for one in reused] == pytest.approx([one.nats for one in whole], rel=1e-9)
    plain = score(small, evaluation_set.test, pad_id=tiny_chat.pad_id)
    assert [(one.row, one.tokens) for one in whole] == [(one.row, one.tokens) for one in plain]
    assert all(abs(one.nats - other.nats) > 1e-3 for one, other in zip(whole, plain, strict=True))
    prompt = tiny_chat.decode(evaluation_set._prompted[0].input_ids)
    assert sum(row.instruction in prompt and row.response in prompt for row in rows[4:]) == 3


def test_what_decides_between_adapters_has_no_part_in_the_verdict(small, tiny_chat):
    rows = list(read_table("sample").rows[:9])
    evaluation_set = EvaluationSet(tiny_chat, Settings(keep="best"), rows[6:], (rows[:2], rows[2:6]))
    assert [one.row for one in evaluation_set.score(small)] == [1, 2]
    assert [one.base.row for one in evaluation_set.compare(small, contextlib.nullcontext).test] == [3, 4, 5, 6]
