"""Base and tuned from one copy of the weights: exact, and leaving no trace."""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from random_run import random_run, save
from safetensors.torch import load_file

from bizassist_nb.api import Run
from bizassist_nb.assistant import assistant as assistant_module
from bizassist_nb.assistant import decoding
from bizassist_nb.assistant.assistant import Assistant
from bizassist_nb.assistant.comparison import Comparison, Conversation
from bizassist_nb.assistant.decoding import Batch, scaled
from bizassist_nb.assistant.loaded import LoadedBase, loaded_base
from bizassist_nb.assistant.prefix_cache import PrefixCache
from bizassist_nb.core.errors import ModelError, QuestionError
from bizassist_nb.core.generation import Generation
from bizassist_nb.data.chat import conversation
from bizassist_nb.data.chat import question as user_turn
from bizassist_nb.data.rows import read_table
from bizassist_nb.models import base as models
from bizassist_nb.models.embedded import embedded_folder
from bizassist_nb.runs.rows import prompt_examples, rows_of

QUESTIONS = [
    "How should we price a new feature?",
    "List two risks of entering the Brazilian market.",
    "Should a factory of 40 people buy cameras for quality control, and what should it measure first?",
]


@pytest.fixture(scope="module")
def assistant(trained):
    return Assistant(trained)


@pytest.fixture(scope="module")
def prompts(assistant, trained):
    loaded = loaded_base("smollm2-135m")
    return [loaded.chat.prompt(conversation(trained.settings.system_prompt, [], question)) for question in QUESTIONS]


@pytest.fixture(scope="module")
def alone(trained):
    """Greedy continuations by plain transformers and PEFT, each model loaded alone: {who: [ids]}."""
    source = embedded_folder()
    chat = models.load_tokenizer(source)
    texts = {}
    for who in ("base", "tuned"):
        model = models.load_nf4(source)
        if who == "tuned":
            model = PeftModel.from_pretrained(model, trained.adapter).eval()
        texts[who] = []
        for question in QUESTIONS:
            ids = torch.tensor([chat.prompt(conversation(trained.settings.system_prompt, [], question))])
            mask = torch.ones_like(ids)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=2
            )
            texts[who].append(chat.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_both_answer_in_one_batch_as_each_does_alone(assistant, alone):
    pairs = [assistant.ask(question, max_new_tokens=24) for question in QUESTIONS]
    assert [pair.base for pair in pairs] == alone["base"]
    assert [pair.tuned for pair in pairs] == alone["tuned"]
    assert alone["base"] != alone["tuned"]


def test_rows_have_the_logits_of_base_and_of_tuned(assistant, prompts):
    assistant.ask(QUESTIONS[0], max_new_tokens=1)
    loaded = loaded_base("smollm2-135m")
    ids = torch.tensor([prompts[0]])
    adapter = loaded.adapter(assistant.runs[0])
    loaded.use([adapter])
    with torch.inference_mode():
        with scaled(loaded.model, {adapter: [0.0, 1.0]}):
            pair = loaded.model(input_ids=ids.repeat(2, 1)).logits
        tuned = loaded.model(input_ids=ids).logits[0]
        with loaded.model.disable_adapter():
            base = loaded.model(input_ids=ids).logits[0]
    assert (pair[0] - base).abs().max() < 1e-4
    assert (pair[1] - tuned).abs().max() < 1e-4
    assert (base - tuned).abs().max() > 0.1


@pytest.mark.parametrize("after", ["a whole answer", "a closed stream", "an error"])
def test_the_model_is_as_before(after, assistant, prompts):
    assistant.ask(QUESTIONS[0], max_new_tokens=1)
    model = loaded_base("smollm2-135m").model
    ids = torch.tensor([prompts[1]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    if after == "a whole answer":
        assistant.ask(QUESTIONS[1], max_new_tokens=3, temperature=0.7)
    elif after == "a closed stream":
        stream = assistant.stream(QUESTIONS[1], Generation(max_new_tokens=50))
        for _ in range(4):
            next(stream)
        stream.close()
    else:
        with pytest.raises(RuntimeError), scaled(model, {"run0": [0.0, 1.0]}):
            raise RuntimeError
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_streams_grow_and_end_in_the_whole(assistant):
    seen = list(assistant.stream(QUESTIONS[0], Generation(max_new_tokens=12)))
    for who in ("base", "tuned"):
        texts = [comparison.answers[who] for comparison in seen]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts[:-1]))
        assert texts[-1] == texts[-2].strip()
        assert "�" not in texts[-1]
    assert seen[-1].cut == ("base", "tuned")


def test_sampling_is_seeded(assistant):
    def answer(seed):
        return assistant.ask(QUESTIONS[0], max_new_tokens=10, temperature=1.0, seed=seed).answers

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_only_those_asked_answer(assistant):
    assert list(assistant.ask(QUESTIONS[0], who=("tuned",), max_new_tokens=2).answers) == ["tuned"]
    assert list(Assistant().ask(QUESTIONS[0], max_new_tokens=2).answers) == ["base"]


def test_the_prompted_base_answers_after_the_rows_that_the_verdict_is_held_against(small, monkeypatch):
    (run, _), loaded = small
    batches = []

    def texts(_model, _chat, batch, *_):
        batches.append(batch)
        return iter([(0, "b"), (1, "t"), (2, "p")])

    monkeypatch.setattr(decoding, "texts", texts)
    found = Assistant(run).ask("Why?", who=("base", "tuned", "prompted"))
    assert (found.answers, found.base, found.tuned) == ({"base": "b", "tuned": "t", "prompted": "p"}, "b", "t")
    [batch] = batches
    rows, system = prompt_examples(rows_of(run)[1]), run.settings.system_prompt
    turns = [(user_turn(row.instruction, row.context), row.response) for row in rows]
    assert len(turns) == 3
    plain, prompted = (loaded.chat.prompt(conversation(system, said, "Why?")) for said in ([], turns))
    assert list(batch.prompts) == [plain, plain, prompted]
    assert list(batch.strengths.values()) == [[0.0, 1.0, 0.0]]
    with pytest.raises(QuestionError, match="takes its examples from the rows of a run"):
        Assistant(base=run.settings).ask("Why?", who=("base", "prompted"))


def test_base_asked_without_a_run_is_not_touched_by_loaded_adapters(assistant, alone):
    assistant.ask(QUESTIONS[0], max_new_tokens=1)
    assert Assistant().ask(QUESTIONS[0], max_new_tokens=24).base == alone["base"][0]


def test_the_base_is_loaded_once():
    assert loaded_base("smollm2-135m") is loaded_base("auto")


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        (" \n", {}, "empty"),
        ("word " * 9000, {}, "shorten it"),
        ("How?", {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ("How?", {"temperature": -1}, "temperature = -1"),
    ],
)
def test_unanswerable_questions_are_refused(assistant, question, options, words):
    with pytest.raises(QuestionError, match=words):
        assistant.ask(question, **options)


def test_a_damaged_adapter_is_refused_by_name(trained, tmp_path):
    copy = Run(shutil.copytree(trained.path, tmp_path / "damaged"))
    weights = copy.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"adapter in .*damaged.* is damaged"):
        Assistant(copy).ask("How?", max_new_tokens=1)
    shutil.rmtree(copy.path / "adapter")
    with pytest.raises(ModelError, match="'damaged' has no adapter"):
        Assistant(copy).ask("How?", max_new_tokens=1)


@pytest.fixture(scope="module")
def twin(trained, tmp_path_factory):
    """A second run on the same base, whose adapter does the opposite of the trained one's."""
    run = Run(shutil.copytree(trained.path, tmp_path_factory.mktemp("twin") / "twin"))
    weights = run.adapter / "adapter_model.safetensors"
    save({name: -each if "lora_B" in name else each for name, each in load_file(weights).items()}, weights)
    return run


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """Two runs on the tiny random model, and the base as it is loaded."""
    folder = tmp_path_factory.mktemp("small")
    runs = [random_run(folder / name, tiny) for name in ("one", "two")]
    return runs, loaded_base(str(tiny))


@pytest.fixture(scope="module")
def fifty():
    """Questions of the package's own rows that stand without a context."""
    rows = [row for row in read_table("sample").rows if not row.context]
    return [row.instruction for row in rows][:50]


def greedy(model, prompt, answer):
    """Whether each token of the answer is the likeliest by plain logits, but for what float32's rounding decides."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return bool((logits.max(-1).values - logits[range(len(answer)), answer] < 1e-3).all())


@pytest.mark.slow
def test_fifty_questions_are_answered_as_by_each_model_alone(assistant, fifty):
    assert len(fifty) == 50
    loaded = loaded_base("smollm2-135m")
    adapter = loaded.adapter(assistant.runs[0])
    loaded.use([adapter])
    differ = 0
    for question in fifty:
        prompt = loaded.chat.prompt(conversation(assistant.runs[0].settings.system_prompt, [], question))
        answers = {0: [], 1: []}
        for row, token in decoding.decode(
            loaded.model,
            Batch([prompt] * 2, {adapter: [0.0, 1.0]}, loaded.chat.stop_ids, loaded.chat.pad_id),
            Generation(max_new_tokens=6),
        ):  # fmt: skip
            answers[row].append(token)
        with loaded.model.disable_adapter():
            assert greedy(loaded.model, prompt, answers[0])
        assert greedy(loaded.model, prompt, answers[1])
        differ += answers[0] != answers[1]
    assert differ > 25


@pytest.mark.slow
def test_several_runs_answer_beside_the_base_as_each_does_alone(assistant, trained, twin, alone):
    together = Assistant(trained, twin).ask(QUESTIONS[0], max_new_tokens=24)
    assert list(together.answers) == ["base", "tuned (quickstart)", "tuned (twin)"]
    assert together.runs == ("quickstart", "twin")
    assert [together.base, together.tuned] == [alone["base"][0], alone["tuned"][0]]
    assert together.answers["tuned (twin)"] == Assistant(twin).ask(QUESTIONS[0], max_new_tokens=24).tuned
    assert len(set(together.answers.values())) == 3


def test_strength_is_exact_at_0_and_1_and_scales_in_between(assistant, trained, prompts):
    answers = {s: assistant.ask(QUESTIONS[0], strength=s, max_new_tokens=8) for s in (0, 0.5, 1)}
    assert answers[0].tuned == answers[0].base
    assert answers[1].tuned == assistant.ask(QUESTIONS[0], max_new_tokens=8).tuned != answers[1].base
    loaded = loaded_base("smollm2-135m")
    adapter = loaded.adapter(trained)
    loaded.use([adapter])
    ids = torch.tensor([prompts[0]])
    with torch.inference_mode():
        with loaded.model.disable_adapter():
            base = loaded.model(input_ids=ids).logits
        tuned = loaded.model(input_ids=ids).logits
        rows = {}
        for strength in (0.0, 0.5, 1.0):
            with scaled(loaded.model, {adapter: [strength]}):
                rows[strength] = loaded.model(input_ids=ids).logits
        for layer in loaded.model.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(0.5)
        half = loaded.model(input_ids=ids).logits
        for layer in loaded.model.modules():
            if hasattr(layer, "unscale_layer"):
                layer.unscale_layer(0.5)
    assert torch.equal(rows[0.0], base)
    assert torch.equal(rows[1.0], tuned)
    assert (rows[0.5] - half).abs().max() < 1e-4
    assert (rows[0.5] - base).abs().max() > 0.1


def test_everyone_goes_on_from_what_they_said_themselves(assistant, trained):
    chat = loaded_base("smollm2-135m").chat
    talk, seen = Conversation(), []
    first = assistant.ask(QUESTIONS[0], conversation=talk, max_new_tokens=6)

    def remember(model, chat, batch, *options):
        seen.extend(batch.prompts)
        return decode(model, chat, batch, *options)

    decode = decoding.texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "texts", remember)
        assistant.ask("Why?", conversation=talk, max_new_tokens=2)
    system = trained.settings.system_prompt
    assert seen == [
        chat.prompt(conversation(system, [(QUESTIONS[0], first.answers[who])], "Why?")) for who in ("base", "tuned")
    ]
    assert seen[0] != seen[1]
    del talk[-1]
    assert talk.turns("tuned") == [(QUESTIONS[0], first.tuned)]
    talk.clear()
    assert talk.turns("base") == []


def test_each_row_of_the_batch_is_answered_by_whom_it_is_named_after(small):
    assistant = Assistant(small[0][0])
    both, base, tuned = (
        assistant.ask("How?", who=who, max_new_tokens=24, repetition_penalty=2.0)
        for who in (("base", "tuned"), ("base",), ("tuned",))
    )
    assert (both.base, both.tuned) == (base.base, tuned.tuned)
    assert both.base != both.tuned


def test_questions_asked_together_are_answered_as_if_asked_alone(small, monkeypatch):
    assistant, generation = Assistant(small[0][0]), Generation(max_new_tokens=12, repetition_penalty=1.5)
    questions, batches, decode = ["How?", "Why is that so?", "What now, and then?"], [], decoding.texts

    def texts(model, chat, batch, *options):
        batches.append(len(batch.prompts))
        return decode(model, chat, batch, *options)

    monkeypatch.setattr(decoding, "texts", texts)
    seen = [([*done], [*growing]) for done, growing in assistant.each(questions, generation)]
    assert batches == [6]
    done, growing = seen[-1]
    assert not growing
    assert any(one.answers["base"] and not other.answers["base"] for _, (one, *_, other) in seen[:-1])
    for question, each in zip(questions, done, strict=True):
        alone = assistant.ask(question, max_new_tokens=12, repetition_penalty=1.5)
        assert (each.question, each.answers, each.cut) == (question, alone.answers, alone.cut)
    monkeypatch.setattr(assistant_module, "_MODULES_ROWS", 4)
    ends = [([*done], [*growing]) for done, growing in assistant.each(questions, generation)]
    assert (batches[4:], len(ends[-1][0])) == ([4, 2], 3)
    assert [len(done) for done, growing in ends if not growing] == [2, 3]  # nothing is half-done between two batches


def test_a_prompt_that_several_rows_answer_alike_is_read_once(small):
    """As the fixed prompts are, with a repetition penalty and without."""
    (run, _), loaded = small
    name, prompts = loaded.adapter(run), [[5, 6, 7, 8], [9, 10]]
    loaded.use([name])
    read = []
    hook = loaded.model.register_forward_pre_hook(
        lambda _m, _a, given: read.append(given["input_ids"].shape[0]), with_kwargs=True
    )

    def answers(prompts, strengths, penalties):
        batch = Batch(prompts, {name: strengths}, frozenset(), loaded.chat.pad_id, penalties)
        found = [[] for _ in prompts]
        for row, token in decoding.decode(loaded.model, batch, Generation(max_new_tokens=6)):
            found[row].append(token)
        return found

    together = answers([*prompts, *prompts, *prompts], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [1.0] * 4 + [1.5] * 2)
    assert read[:2] == [4, 6]
    assert together[:2] == answers(prompts, [0.0, 0.0], [1.0, 1.0])
    assert together[2:4] == answers(prompts, [1.0, 1.0], [1.0, 1.0])
    assert together[4:] == answers(prompts, [0.0, 0.0], [1.5, 1.5])
    hook.remove()


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_went(small):
    talk = Conversation()
    stream = Assistant(small[0][0]).stream("How?", Generation(max_new_tokens=50, temperature=1.0), conversation=talk)
    shown = list(itertools.islice(stream, 9))[-1]
    stream.close()
    assert [talk.turns(who)[-1][1] for who in ("base", "tuned")] == [shown.base.strip(), shown.tuned.strip()]


def test_a_text_ends_the_answer_that_has_it_and_is_left_out(small):
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 2}
    assistant = Assistant(small[0][0])
    whole = assistant.ask("How?", **options)
    stop = whole.base[20:24]
    assert stop not in whole.tuned
    found = assistant.ask("How?", stop=("never said", stop), **options)
    assert found.answers == {"base": whole.base.partition(stop)[0].strip(), "tuned": whole.tuned}
    assert (whole.cut, found.cut) == (("base", "tuned"), ("tuned",))
    lengths = [int(found.figures[who].partition(" tokens, ")[0]) for who in ("base", "tuned")]
    assert lengths[0] < lengths[1] == 24  # nothing is made of the answer that is over


def test_another_system_prompt_is_told_to_all_and_said(small):
    (run, _), loaded = small
    batches = []

    def texts(_model, _chat, batch, *_):
        batches.append(batch)
        return iter([])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "texts", texts)
        notes = [Assistant(run).ask("Why?", system=system).note for system in (None, "", "Be brief.")]
    assert notes == [None, "No system prompt.", 'System prompt: "Be brief.".']
    for batch, system in zip(batches, (run.settings.system_prompt, "", "Be brief."), strict=True):
        assert batch.prompts == [loaded.chat.prompt(conversation(system, [], "Why?"))] * 2


@pytest.mark.parametrize(("option", "value"), [("stop", ("",)), ("stop", "word"), ("system", "\0"), ("system", 3)])
def test_options_that_are_no_texts_are_refused(option, value):
    with pytest.raises(QuestionError, match=f"{option} = .*: has to be a t"):
        Generation(**{option: value})


def test_a_conversation_too_long_loses_its_oldest_turns_and_says_so(small):
    runs, loaded = small
    talk = Conversation()
    for number in range(6):
        talk.add(f"Question {number}? " + "and so on " * 150, {"base": "yes " * 200, "tuned": "no"})
    comparison = Assistant(runs[0]).ask("And now?", conversation=talk, max_new_tokens=4)
    most = loaded.model.config.max_position_embeddings
    assert f"outgrown the {most:,} tokens" in comparison.note
    assert "turns were left out" in comparison.note
    assert comparison.cut == ("base", "tuned")
    with pytest.raises(QuestionError, match="shorten it"):
        Assistant(runs[0]).ask("word " * most, conversation=talk)


def read(loaded, prompts, strengths, prefix):
    """The logits after the prompts, and how many columns were read for them."""
    columns = []
    forward = decoding.ModuleSteps.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decoding.ModuleSteps, "forward", lambda steps, ids: columns.append(ids.shape[1]) or forward(steps, ids)
        )
        batch = Batch(prompts, strengths, frozenset(), loaded.chat.pad_id)
        with decoding.read_prompts(loaded.model, batch, 1, prefix) as (found, _):
            return found, columns[0]


@pytest.mark.slow
def test_a_conversation_is_read_from_where_it_goes_on_with_the_same_logits(assistant, trained):
    loaded = loaded_base("smollm2-135m")
    strengths = {loaded.adapter(trained): [0.0, 1.0]}
    talk = Conversation()
    for turn, question in enumerate(QUESTIONS[:2]):
        assistant.ask(question, conversation=talk, max_new_tokens=6)
        if turn == 0:  # answers of other lengths, which nobody has read yet
            talk.add("Why?", {"base": "Because it costs less, and sells better.", "tuned": "It sells."})
        prompts = [
            loaded.chat.prompt(conversation(trained.settings.system_prompt, talk.turns(who), "And then?"))
            for who in ("base", "tuned")
        ]
        whole, width = read(loaded, prompts, strengths, None)
        found, columns = read(loaded, prompts, strengths, loaded.prefix_cache)
        assert (found - whole).abs().max() < 1e-4
        assert columns < width / 2
    assert len(prompts[0]) != len(prompts[1])


@pytest.fixture
def answered(small):
    """Answers two rows of unequal length on the tiny model and gives what was read of each with it."""
    (one, _), loaded = small
    strengths = {loaded.adapter(one): [0.0, 1.0]}
    loaded.use(list(strengths))
    prompts = [list(range(100, 130)), list(range(100, 117))]

    def answer(prefix, most=16, stop_ids=frozenset()):
        said = [list(prompt) for prompt in prompts]
        batch = Batch(prompts, strengths, stop_ids, pad_id=0)
        generation = Generation(max_new_tokens=8, temperature=1.0, seed=1)
        stream = decoding.decode(loaded.model, batch, generation, prefix)
        for row, token in itertools.islice(stream, most):
            said[row].append(token)
        stream.close()
        return said

    return loaded, strengths, answer


@pytest.mark.parametrize(
    "after", ["a whole answer", "the same question", "one that was over first", "a closed stream", "an interrupt"]
)
def test_what_was_read_is_used_again_with_the_same_logits(after, answered):
    loaded, strengths, answer = answered
    prefix = PrefixCache()
    if after in ("a whole answer", "the same question"):
        said = answer(prefix)
    elif after == "one that was over first":
        longest = answer(None)
        said = answer(prefix, stop_ids=frozenset({longest[1][17 + 5]}))
        assert [len(row) for row in said] == [38, 22]
    elif after == "a closed stream":
        said = answer(prefix, most=5)
    else:
        said, layer = answer(None, most=8), loaded.model.get_decoder().layers[1]
        calls = itertools.count()

        def interrupt(*_):
            if next(calls) == 4:  # in the fourth step, between the layers
                raise KeyboardInterrupt

        hook = layer.register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                answer(prefix)
        finally:
            hook.remove()
    following = [[*row, 7, 8, 9] for row in said]
    if after == "the same question":
        following = [said[0][:30], said[1][:17]]
    whole, width = read(loaded, following, strengths, None)
    found, columns = read(loaded, following, strengths, prefix)
    assert (found - whole).abs().max() < 1e-5
    assert columns <= 7 < width


@pytest.mark.parametrize("other", ["strength", "adapter", "rows", "question", "nothing cached"])
def test_what_was_read_otherwise_is_not_used(other, answered, small):
    loaded, strengths, answer = answered
    prefix = PrefixCache()
    prompts = [[*row, 7] for row in answer(prefix)]
    if other == "strength":
        strengths = {name: [0.0, 0.5] for name in strengths}
    elif other == "adapter":
        strengths = {loaded.adapter(small[0][1]): [0.0, 1.0]}
    elif other == "rows":
        strengths, prompts = {name: [1.0] for name in strengths}, prompts[1:]
    elif other == "question":
        prompts = [[5, *row] for row in prompts]
    else:
        cached = weakref.ref(prefix.cached[2][0][0])
        prefix.forget()
        assert cached() is None
    found, columns = read(loaded, prompts, strengths, prefix)
    whole, width = read(loaded, prompts, strengths, None)
    assert columns == width
    assert torch.equal(found, whole)


def size(model):
    return sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))


def test_adapters_come_and_go_without_a_trace(small):
    (one, two), _ = small
    loaded = LoadedBase(models.resolve(one.settings.model))
    loaded.adapter(one)
    before = size(loaded.model)
    ids = torch.tensor([[5, 6, 7]])
    loaded.use([loaded.adapter(one)])
    with torch.inference_mode():
        alone = loaded.model(input_ids=ids).logits
    name = loaded.adapter(two)
    assert size(loaded.model) > before
    kept = [weakref.ref(each) for key, each in loaded.model.named_parameters() if f".{name}." in key]
    assert len(kept) == 28
    loaded.forget(two.adapter.resolve())
    gc.collect()
    assert size(loaded.model) == before
    assert not any(each() is not None for each in kept)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=ids).logits, alone)
        loaded.forget(one.adapter.resolve())
        base = loaded.model(input_ids=ids).logits
        loaded.use([loaded.adapter(one)])
        assert torch.equal(loaded.model(input_ids=ids).logits, alone)
    assert not torch.equal(base, alone)


def test_an_adapter_that_was_trained_anew_is_loaded_anew(small, tmp_path):
    run = Run(shutil.copytree(small[0][0].path, tmp_path / "again"))
    before = Assistant(run).ask("How?", max_new_tokens=8)
    weights = run.adapter / "adapter_model.safetensors"
    save({name: -5 * each for name, each in load_file(weights).items()}, weights)
    os.utime(weights, (1, 1))
    after = Assistant(run).ask("How?", max_new_tokens=8)
    assert (after.base, after.tuned != before.tuned) == (before.base, True)
    loaded_base(run.model).forget_cache()
    assert Assistant(run).ask("How?", max_new_tokens=8) == after


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("elsewhere/other-7b", None, "was made for another base than .*: for elsewhere/other-7b"),
        (None, (4, 96), r"is \(4, 96\) where .* has \(4, 64\)"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_name_and_by_shape(small, tmp_path, name, shape, words):
    run = Run(shutil.copytree(small[0][0].path, tmp_path / "other"))
    if name:
        config = run.adapter / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": name}))
    if shape:
        weights = run.adapter / "adapter_model.safetensors"
        tensors = load_file(weights)
        tensors[next(key for key in tensors if "q_proj.lora_A" in key)] = torch.zeros(shape)
        save(tensors, weights)
    with pytest.raises(ModelError, match=words):
        Assistant(run).ask("How?", max_new_tokens=1)


def test_an_answer_goes_on_as_it_began_when_another_run_is_asked_in_between(small):
    (one, two), _ = small
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    whole = Assistant(one).ask("How?", **options)
    stream = Assistant(one).stream("How?", Generation(**options))
    for _ in range(6):
        next(stream)
    Assistant(two).ask("Why?", max_new_tokens=2)
    assert list(stream)[-1] == whole
    assert whole.tuned != whole.base


def test_more_runs_than_there_is_room_for_are_refused(small, tmp_path):
    runs = [Run(shutil.copytree(small[0][0].path, tmp_path / f"run{number}")) for number in range(9)]
    with pytest.raises(QuestionError, match="9 runs cannot answer together; ask at most 8"):
        Assistant(*runs)


def test_what_auto_stands_for_does_not_change_while_it_is_loaded(small, monkeypatch):
    source = loaded_base("auto").base.source
    monkeypatch.setattr(models, "resolve", lambda _: pytest.fail("auto was looked up again"))
    assert loaded_base("auto").base.source == source


def test_runs_on_different_bases_cannot_answer_together(trained, small):
    with pytest.raises(QuestionError, match="only runs on the same base"):
        Assistant(trained, small[0][0])


def test_an_answer_is_not_kept_at_each_of_its_lengths(small, monkeypatch):
    living, stream = [], Assistant.stream

    def counted(*arguments, **named):
        for comparison in stream(*arguments, **named):
            yield comparison
            living.append(sum(type(each) is Comparison for each in gc.get_objects()))

    monkeypatch.setattr(Assistant, "stream", counted)
    Assistant(small[0][0]).ask("How?", max_new_tokens=8)
    assert len(living) > 8
    assert max(living) - living[0] <= 2


def test_runs_of_the_same_name_from_two_folders_answer_each_for_itself(small, tiny, tmp_path):
    one = small[0][0]
    weights = one.adapter / "adapter_model.safetensors"
    other = Run(shutil.copytree(one.path, tmp_path / one.name))
    save({name: -3 * each for name, each in load_file(weights).items()}, other.adapter / weights.name)
    alone = [Assistant(run).ask("How?", max_new_tokens=12).tuned for run in (one, other)]
    together = Assistant(one, other).ask("How?", max_new_tokens=12)
    assert list(together.answers) == ["base", f"tuned ({one.path})", f"tuned ({other.path})"]
    assert list(together.answers.values())[1:] == alone
    assert len(set(alone)) == 2
    elsewhere = random_run(tmp_path / "elsewhere" / one.name, Path(shutil.copytree(tiny, tmp_path / "base")))
    with pytest.raises(QuestionError, match="only runs on the same base"):
        Assistant(one, elsewhere)


@pytest.mark.parametrize("options", [{"strength": 1.6}, {"top_p": 0}, {"top_k": -1}, {"repetition_penalty": 0}])
def test_settings_out_of_range_are_refused_by_name(small, options):
    with pytest.raises(QuestionError, match=f"{next(iter(options))} = "):
        Assistant(small[0][0]).ask("How?", **options)


def test_each_setting_of_sampling_has_its_effect(assistant):
    def answer(**options):
        return assistant.ask(QUESTIONS[0], max_new_tokens=8, seed=3, **options).answers

    greedy, hot = answer(), answer(temperature=2.0)
    assert hot != greedy
    assert answer(temperature=2.0, top_k=1) == answer(temperature=2.0, top_p=0.01) == greedy
    assert answer(repetition_penalty=2.0) != greedy


def test_gpu_memory_that_runs_out_is_said_in_words(small, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoding, "decode", full)
    with pytest.raises(QuestionError, match=r"ran out of memory at .* clear the conversation"):
        Assistant(small[0][0]).ask("How?")
    monkeypatch.setattr(models, "load_nf4", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**34))
    with pytest.raises(ModelError, match=r"does not fit .* \(1.0 GiB are free\): while a run is"):
        LoadedBase(models.resolve(small[0][0].settings.model))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no build for this system")
def test_gpu_kernels_compute_what_the_modules_do():
    """Triton's interpreter stands in for a GPU; in a process of its own, which it has to be chosen for beforehand."""
    script = Path(__file__).parents[1] / "fused_on_cpu.py"
    triton = Path(sys.prefix) / "triton"
    assert triton.is_dir(), f"{triton} is missing; make .venv/dev makes it"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(triton)])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert max(differences) < 2e-5
    assert len(differences) == 10
