"""Base and tuned from one copy of the weights: exact, and leaving no trace."""

import itertools

import pytest
import torch
from peft import PeftModel

from bizassist_nb import models
from bizassist_nb.assistant.assistant import Assistant, QuestionError
from bizassist_nb.assistant.bases import loaded_base
from bizassist_nb.assistant.decoding import scaled
from bizassist_nb.data.chat import conversation
from bizassist_nb.errors import ModelError
from bizassist_nb.runs import Run

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
    source = models.embedded_folder()
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
    adapter = loaded.adapter(assistant.run)
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
        stream = assistant.stream(QUESTIONS[1], max_new_tokens=50)
        for _ in range(4):
            next(stream)
        stream.close()
    else:
        with pytest.raises(RuntimeError), scaled(model, {"run0": [0.0, 1.0]}):
            raise RuntimeError
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_streams_grow_and_end_in_the_whole(assistant):
    seen = list(assistant.stream(QUESTIONS[0], max_new_tokens=12))
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
    import shutil

    copy = Run(shutil.copytree(trained.path, tmp_path / "damaged"))
    weights = copy.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="adapter of run 'damaged' cannot be loaded"):
        Assistant(copy).ask("How?", max_new_tokens=1)
    shutil.rmtree(copy.path / "adapter")
    with pytest.raises(ModelError, match="has no adapter yet"):
        Assistant(copy).ask("How?", max_new_tokens=1)
