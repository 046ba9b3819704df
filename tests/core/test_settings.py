"""Settings: their defaults, their limits, and TOML there and back."""

import contextlib
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bizassist_nb.core.errors import SettingsError
from bizassist_nb.core.settings import COLUMN, ROLES, Settings, reference

FIELDS = dataclasses.fields(Settings)


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_toml(text, overrides)
    return caught.value.problems


def test_defaults_are_those_of_the_contract():
    values = dataclasses.asdict(Settings())
    assert values.pop("system_prompt").startswith("You are an assistant")
    assert values == {
        "model": "auto",
        "data": "dolly",
        "config": "",
        "split": "train",
        "revision": "",
        "columns": {},
        "template": {},
        "subset": 1000,
        "seed": 42,
        "rank": 16,
        "alpha": 16,
        "rslora": False,
        "target_modules": "all-linear",
        "dropout": 0.0,
        "epochs": 1,
        "learning_rate": "auto",
        "scheduler": "linear",
        "weight_decay": 0.0,
        "warmup_steps": "auto",
        "max_length": 2048,
        "batch_size": 4,
        "micro_batch": "auto",
        "train_on": "response",
        "held_out": 64,
        "evaluate_every": "auto",
        "keep": "last",
        "stop_early": 0,
        "checkpoint_minutes": 10.0,
        "engine": "auto",
        "gpus": "auto",
        "accelerate_config": "",
        "report_to": "none",
        "runs_dir": "runs",
    }
    assert Settings.from_toml("") == Settings()
    assert Settings().changed() == {}


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().rank = 8


# Values of every field within its limits, made from what the field says of itself.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
names = texts.filter(lambda text: text.strip())


def values_of(field: dataclasses.Field) -> st.SearchStrategy:
    limits = field.metadata
    if field.name == "columns":
        return st.dictionaries(st.sampled_from(ROLES), names)
    if field.name == "template":
        turn = st.tuples(texts, st.sampled_from(["{text}", "{a b}"]), texts).map("".join)
        turn = turn.filter(lambda text: any(COLUMN.findall(text)))  # "{{text}}" has braces, and no column
        return st.just({}) | st.fixed_dictionaries({"user": turn, "assistant": turn})
    if limits["choices"]:
        return st.sampled_from(limits["choices"])
    if limits["least"] is None:
        return texts if Settings().__dict__[field.name] == "" or field.name == "system_prompt" else names
    numbers = st.floats if isinstance(limits["least"], float) else st.integers
    inside = numbers(min_value=limits["least"], max_value=limits["most"])
    return st.sampled_from(limits["words"]) | inside if limits["words"] else inside


def whole_batches(values: dict) -> dict:
    """Those values with a batch that can be shared out, a micro_batch that divides each share, and one way to do it."""
    gpus = values["gpus"] if isinstance(values["gpus"], int) else 1
    even = values["batch_size"] % gpus == 0 and not values["accelerate_config"]
    values = values if even else {**values, "gpus": "auto"}
    roles = ("context", "category") if values["template"] else ROLES
    values = {**values, "columns": {role: name for role, name in values["columns"].items() if role in roles}}
    each, micro = values["batch_size"] // (gpus if even else 1), values["micro_batch"]
    return values if micro == "auto" or each % micro == 0 else {**values, "micro_batch": "auto"}


def enough_held_out(values: dict) -> dict:
    """Those values with held-out rows for validation and for the test."""
    return {**values, "held_out": max(3, values["held_out"])}


any_settings = (
    st.fixed_dictionaries({field.name: values_of(field) for field in FIELDS}).map(whole_batches).map(enough_held_out)
)


@settings(deadline=None)
@given(any_settings)
def test_any_settings_come_back_equal_from_toml(values):
    asked = Settings(**values)
    assert Settings.from_toml(asked.to_toml()) == asked
    assert Settings(**asked.changed()) == asked


@pytest.mark.parametrize(
    "text",
    ['"""', "'''", "\\", 'a "quoted" \\n', "two\nlines", "\r\n", "\t\x1f\x7f", "# no comment", "é 漢 🦜 \u2028", ""],
)
def test_odd_texts_survive_a_toml_file(text, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(Settings(system_prompt=text).to_toml(), "utf-8")
    assert Settings.from_toml(path.read_text("utf-8")).system_prompt == text


@pytest.mark.parametrize(
    "template",
    [
        '{ user = "{a}" }',
        '{ user = "{a}", assistant = "b" }',
        '{ user = "{{a}}", assistant = "{b}" }',
        '{ user = "{a}", assistant = "{b}", system = "{c}" }',
        '{ user = "{a}", assistant = 3 }',
        '"{a}"',
    ],
)
def test_a_template_has_a_column_in_the_words_of_both(template):
    (problem,) = problems(f"template = {template}")
    assert problem.startswith("template = ")
    assert problem.endswith('each with a {column}: { user = "Classify: {text}", assistant = "{label}" }')


@pytest.mark.parametrize("value", ["1", "0", '"true"', "2.0"])
def test_a_truth_value_is_true_or_false(value):
    assert problems(f"rslora = {value}") == (f"rslora = {value.removesuffix('.0')}: has to be false or true",)
    assert Settings.from_toml("", ["rslora=true"]).changed() == {"rslora": True}


def test_what_a_template_makes_has_no_column_beside_it():
    text = '[columns]\nresponse = "a"\ncategory = "c"\n[template]\nuser = "{a}"\nassistant = "{b}"'
    assert problems(text) == ('columns = { response = "a", category = "c" }: template makes response; leave them out',)
    found = Settings.from_toml('columns.category = "c"', ["template.user={a}", "template.assistant={b}"])
    assert (found.template, found.columns) == ({"user": "{a}", "assistant": "{b}"}, {"category": "c"})


def test_all_problems_of_a_file_come_together_with_value_and_range():
    found = problems(
        'rank = 0\ndropout = 2.5\ntrain_on = "answers"\nmodel = "  "\nlearningrate = 1\nwarmup_steps = "some"\n'
        'columns = { answer = "a" }\nengine = 3'
    )
    assert set(found) == {
        "rank = 0: has to be a whole number from 1 to 512",
        "dropout = 2.5: has to be a number from 0 to 0.9",
        'train_on = "answers": has to be "response" or "last" or "all"',
        'model = "  ": has to be a text that is not empty',
        "learningrate (line 5, 'learningrate = 1'): there is no such setting; did you mean learning_rate?",
        'warmup_steps = "some": has to be a whole number from 0 to 1,000,000 or "auto"',
        'columns = { answer = "a" }: has to be a table of column names, its keys among '
        'instruction, context, response, category: { instruction = "question" }',
        'engine = 3: has to be "auto" or "unsloth" or "transformers"',
    }


def test_the_message_of_an_error_holds_every_problem():
    with pytest.raises(SettingsError) as caught:
        Settings(rank=0, epochs=0)
    assert len(caught.value.problems) == 2
    assert all(problem in str(caught.value) for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("key", "said"),
    [("max_lenght", "did you mean max_length?"), ("lr", "there are model, data,"), ("Rank", "did you mean rank?")],
)
def test_unknown_key_names_the_nearest_or_all(key, said):
    assert said in problems(f"{key} = 1")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subset = 3\n rnak = 8", "rnak (line 2, 'rnak = 8'): there is no such setting; did you mean rank?"),
        ("\n[colums]\ncontext = 'c'", "colums (line 2, '[colums]'): there is no such setting"),
        ("subset = 3\nrank = \nseed = 1", "(at line 2, column 8): 'rank ='. Each line"),
        ("a.b = 1\n" + "x" * 99 + " = 1", "(line 2, '" + "x" * 79 + "…'): there is no"),
    ],
)
def test_a_typo_is_shown_in_its_line(text, said):
    assert said in "\n".join(problems(text))


def test_an_unknown_override_has_no_line():
    assert problems("subset = 3", "rnak=8") == ("rnak: there is no such setting; did you mean rank?",)


NUMBERS = [field for field in FIELDS if field.metadata["least"] is not None]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
@pytest.mark.parametrize("value", [True, False, None, "3", [1], {}, float("nan"), float("inf"), -1])
def test_a_number_is_neither_truth_nor_text_nor_out_of_range(field, value):
    with pytest.raises(SettingsError, match=f"{field.name} = "):
        Settings(**{field.name: value})


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_limits_belong_to_the_range(field):
    least, most = field.metadata["least"], field.metadata["most"]
    batch = {"batch_size": 4096}  # which every limit of micro_batch divides
    for value in (least, most):
        assert getattr(Settings(**{**batch, field.name: value}), field.name) == value
    with pytest.raises(SettingsError, match=f"{field.name} = "):
        Settings(**{**batch, field.name: most + 1})


@pytest.mark.parametrize("field", [field for field in FIELDS if field.type is not float], ids=lambda field: field.name)
def test_a_fraction_fits_only_fractional_fields(field):
    with pytest.raises(SettingsError, match=field.name):
        Settings(**{field.name: 1.5})


@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=["NUL", "lone surrogate"])
@pytest.mark.parametrize("field", ["data", "system_prompt", "runs_dir", "columns"])
def test_texts_that_no_file_can_hold_are_refused(field, text):
    with pytest.raises(SettingsError, match=field) as caught:
        Settings(**{field: {"instruction": text} if field == "columns" else text})
    str(caught.value).encode()  # the message itself can be printed


def test_micro_batch_divides_the_batch():
    assert Settings(batch_size=12, micro_batch=3).micro_batch == 3
    assert problems("batch_size = 12\nmicro_batch = 5") == (
        "micro_batch = 5: has to divide batch_size = 12; it can be 1, 2, 3, 4, 6, 12",
    )


def test_micro_batch_that_does_not_divide_comes_with_the_other_problems():
    found = problems("batch_size = 12\nmicro_batch = 5\nrank = 0")
    assert len(found) == 2
    assert any("has to divide batch_size = 12" in problem for problem in found)


def test_a_batch_is_shared_out_evenly_and_micro_batches_divide_a_share():
    assert Settings(batch_size=12, gpus=3, micro_batch=2).share(3).batch_size == 4
    assert problems("batch_size = 4\ngpus = 3") == (
        "batch_size = 4: has to be a multiple of the 3 processes that share the examples of a step (gpus, or "
        "num_processes of accelerate_config); take 3 or 6",
    )
    assert problems("batch_size = 12\ngpus = 3\nmicro_batch = 6") == (
        "micro_batch = 6: has to divide batch_size = 12 / 3 processes = 4; it can be 1, 2, 4",
    )
    with pytest.raises(SettingsError, match="take 8"):
        Settings(batch_size=4).share(8)


def test_either_gpus_or_a_configuration_says_how_many_processes():
    assert problems('gpus = "all"\naccelerate_config = "a.yaml"') == (
        'gpus = "all": leave it "auto" beside accelerate_config, which has num_processes for it',
    )
    assert problems("gpus = 0") == ('gpus = 0: has to be a whole number from 1 to 1,024 or "auto" or "all"',)


def test_validation_takes_rows_that_the_test_can_spare():
    words = 'has to be at least 3 beside keep = "best" or stop_early, which take a third of the rows for validation'
    for chosen in ('keep = "best"', "stop_early = 2"):
        assert problems(f"held_out = 2\n{chosen}\nrank = 0") == (
            "rank = 0: has to be a whole number from 1 to 512",
            f"held_out = 2: {words}",
        )
    assert not Settings(held_out=2).validates
    assert Settings(held_out=3, stop_early=1).validates


def test_overrides_come_after_the_file_and_are_toml_or_bare_words():
    found = Settings.from_toml(
        'rank = 4\ndata = "sample"\nepochs = 2',
        ["rank=32", " data = rows.csv ", "system_prompt=a = b", 'model="x/y"', "learning_rate=1e-3", "engine=unsloth"],
    )
    assert found.changed() == {
        "rank": 32,
        "data": "rows.csv",
        "epochs": 2,
        "system_prompt": "a = b",
        "model": "x/y",
        "learning_rate": 1e-3,
        "engine": "unsloth",
    }
    assert Settings.from_toml("", ["system_prompt="]).system_prompt == ""
    assert Settings.from_toml("", ['columns={instruction = "q"}']).columns == {"instruction": "q"}


def test_dotted_overrides_add_to_each_other():
    found = Settings.from_toml("", ['columns.instruction="q"', "columns.response=a"])
    assert found.columns == {"instruction": "q", "response": "a"}


@pytest.mark.parametrize("override", ["rank", "=3", "", "  = x"])
def test_an_override_without_key_or_value_says_what_one_is(override):
    assert "an override is KEY=VALUE" in problems("", override)[0]


def test_overrides_are_checked_like_the_file():
    assert problems("rank = 0", "epochs=zero", "rnk=3") == (
        "rnk: there is no such setting; did you mean rank?",
        "rank = 0: has to be a whole number from 1 to 512",
        'epochs = "zero": has to be a whole number from 1 to 1,000',
    )


@pytest.mark.parametrize("text", ["rank 16", "rank = ", 'data = "dolly', "rank = 1\nrank = 2", "data = rows.csv"])
def test_what_is_not_toml_says_so_and_shows_a_line_that_is(text):
    assert problems(text)[0].startswith("this is not TOML: ")
    assert 'data = "dolly"' in problems(text)[0]


@settings(deadline=None)
@given(st.text())
def test_any_text_is_settings_or_a_settings_error(text):
    with contextlib.suppress(SettingsError):
        Settings.from_toml(text)


def test_every_field_has_a_text_and_a_range():
    found = reference()
    assert [name for name, _, _ in found] == [field.name for field in FIELDS]
    for name, default, text in found:
        assert len(text) > 20, name
        assert "[" in text, name
        assert default, name
    assert ("rank", "16") in [row[:2] for row in found]


def test_a_run_lives_in_runs_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(runs_dir="~/r").run_path("a") == tmp_path / "r" / "a"
