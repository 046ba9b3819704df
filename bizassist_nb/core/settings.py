"""The settings of a run: one frozen dataclass whose fields say what they mean, in which unit and range.

The text of a field is written once, here; the command line's help, the widgets' tooltips and the
reference in the documentation are made from it.
"""

import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import tomli_w

from bizassist_nb.core.errors import SettingsError, without_secrets

ROLES: Final = ("instruction", "context", "response", "category")
"""What the columns of a data set are for; `Settings.columns` maps these to the data's own names."""

_AUTO: Final = "auto"
_MAY_BE_EMPTY: Final = ("system_prompt", "accelerate_config")


def _number(default: float | str, text: str, *, least: float, most: float, words: tuple[str, ...] = ()) -> Any:
    """A number with its help text, its range (inclusive), and the words that may stand for it."""
    return _described(default, text, {"least": least, "most": most, "words": words})


def _choice(default: str, text: str, *, choices: tuple[str, ...]) -> Any:
    """One of several words."""
    return _described(default, text, {"choices": choices})


def _text(default: Any, text: str) -> Any:
    """Any text, or a table of texts."""
    return _described(default, text, {})


def _described(default: Any, text: str, limits: Mapping[str, Any]) -> Any:
    metadata = {"text": text, "least": None, "most": None, "choices": (), "words": (), **limits}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run does.

    Raises:
        SettingsError: naming every field at fault with its value and what is allowed.
    """

    model: str = _text(
        _AUTO,
        'base model: "mistral-7b", "smollm2-135m" (the embedded one), a hub id or a local folder; '
        '"auto" takes mistral-7b where a CUDA GPU has room for it, else smollm2-135m',
    )
    data: str = _text(
        "dolly",
        'rows to learn from: "dolly" (Databricks Dolly 15k), "sample" (120 rows that ship with the package), '
        "a hub data set's id, or the path of a .jsonl, .json, .csv or .parquet file",
    )
    columns: Mapping[str, str] = _text(
        dict,
        "which column of the data is the instruction, context, response or category, where the names are not "
        'recognised: { instruction = "question", response = "answer" }',
    )
    subset: int = _number(1000, "rows to train on, drawn by a seeded shuffle", least=1, most=10_000_000)
    seed: int = _number(42, "seed of the shuffle, of the adapter's start and of training", least=0, most=2**32 - 1)
    system_prompt: str = _text(
        "You are an assistant for product development, business decisions and the use of AI in companies.",
        'what the model is told before each question, in training and in chat; "" for nothing',
    )
    rank: int = _number(
        16, "LoRA rank: width of the adapter; more learns more and takes more memory", least=1, most=512
    )
    alpha: int = _number(16, "LoRA alpha: the adapter's output is multiplied by alpha / rank", least=1, most=4096)
    dropout: float = _number(0.0, "share of the adapter's inputs dropped in training", least=0.0, most=0.9)
    epochs: int = _number(1, "times each training row is seen", least=1, most=1000)
    learning_rate: float = _number(2e-4, "peak learning rate; it then falls linearly to 0", least=1e-8, most=1.0)
    warmup_steps: int | str = _number(
        _AUTO,
        'steps in which the learning rate rises to its peak; "auto" is 8 % of all steps, at most 20',
        least=0,
        most=1_000_000,
        words=(_AUTO,),
    )
    max_length: int = _number(
        2048, "tokens a row may have; the end of a longer answer is cut", least=16, most=1_048_576
    )
    batch_size: int = _number(4, "examples a step learns from", least=1, most=4096)
    micro_batch: int | str = _number(
        _AUTO,
        "examples that go through the model at once; a divisor of batch_size, smaller takes less memory; "
        '"auto" takes the least time of those whose longest rows fit',
        least=1,
        most=4096,
        words=(_AUTO,),
    )
    train_on: str = _choice(
        "response", 'tokens that are learned: the "response" with its end token, or "all"', choices=("response", "all")
    )
    held_out: int = _number(64, "rows kept out of training, on which base and tuned are scored", least=2, most=100_000)
    evaluate_every: int | str = _number(
        _AUTO,
        'steps between scores of the held-out rows in training; "auto" has trained on three times as many rows as are '
        "held out between two of them (on each GPU, as one scores for all unless the base is sharded), which takes "
        "about a tenth of the time",
        least=1,
        most=1_000_000,
        words=(_AUTO,),
    )
    keep: str = _choice(
        "last",
        'adapter that the run saves: the "last" one, or the "best" on the held-out rows, which then had a hand in '
        "choosing it and flatter it a little",
        choices=("last", "best"),
    )
    checkpoint_minutes: float = _number(10.0, "minutes between checkpoints", least=0.0, most=1440.0)
    engine: str = _choice(
        _AUTO,
        'what trains: "unsloth", or plain "transformers" with PEFT; "auto" takes unsloth where it is '
        "installed and works on this device, and transformers on a Hopper GPU or later, where its passes are CUDA "
        "graphs",
        choices=(_AUTO, "unsloth", "transformers"),
    )
    gpus: int | str = _number(
        _AUTO,
        'GPUs of this machine to train on; "auto" is one if there is one, "all" is every one there is; they share the '
        "examples of a step, so batch_size has to be a multiple of their number",
        least=1,
        most=1024,
        words=(_AUTO, "all"),
    )
    accelerate_config: str = _text(
        "",
        "file that `accelerate config` wrote, for several machines or FSDP; in place of gpus it says how many "
        'processes train; "" for none',
    )
    runs_dir: str = _text("runs", "folder in which each run has its own folder")

    def __post_init__(self) -> None:
        """Check every field, and what only holds between fields."""
        problems = [
            problem for field in dataclasses.fields(self) for problem in _problems(field, getattr(self, field.name))
        ]
        if not any(problem.startswith(("batch_size ", "micro_batch ", "gpus ")) for problem in problems):
            problems += self._uneven(self.gpus) if isinstance(self.gpus, int) else self._uneven(1)
        if self.accelerate_config and self.gpus != _AUTO:
            problems.append(
                f'gpus = {_shown(self.gpus)}: leave it "auto" beside accelerate_config, which has num_processes for it'
            )
        if problems:
            raise SettingsError(problems)

    def share(self, processes: int) -> "Settings":
        """The settings as each of so many processes has them: its part of the examples of a step.

        Raises:
            SettingsError: if that is no whole number of them, or micro_batch does not divide it.
        """
        if problems := self._uneven(processes):
            raise SettingsError(problems)
        return dataclasses.replace(self, batch_size=self.batch_size // processes, gpus=_AUTO)

    def _uneven(self, processes: int) -> list[str]:
        """Problems with dividing batch_size among so many processes, and each one's share into micro-batches."""
        if self.batch_size % processes:
            below = self.batch_size // processes * processes
            return [
                f"batch_size = {self.batch_size}: has to be a multiple of the {processes} processes that share the "
                f"examples of a step (gpus, or num_processes of accelerate_config); take "
                f"{f'{below} or ' if below else ''}{below + processes}"
            ]
        each = self.batch_size // processes
        if isinstance(self.micro_batch, int) and each % self.micro_batch:
            of = f"batch_size = {self.batch_size}" + (f" / {processes} processes = {each}" if processes > 1 else "")
            return [
                f"micro_batch = {self.micro_batch}: has to divide {of}; "
                f"it can be {_listed(d for d in range(1, each + 1) if each % d == 0)}"
            ]
        return []

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings from field names and values, defaults elsewhere; SettingsError names all problems at once."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        problems = [_unknown(key, known) for key in values if key not in known]
        usable = {key: value for key, value in values.items() if key in known}
        try:
            settings = cls(**usable)
        except SettingsError as error:
            raise SettingsError([*problems, *error.problems]) from None
        if problems:
            raise SettingsError(problems)
        return settings

    @classmethod
    def from_toml(cls, text: str, overrides: Iterable[str] = ()) -> "Settings":
        """Settings from a TOML text, with `key=value` overrides applied after it.

        The value of an override is TOML too; one that is not (`data=rows.csv`) is taken as the text it is.
        """
        try:
            values = _toml(text.removeprefix("\ufeff"))
        except ValueError as error:
            raise SettingsError(
                [f'this is not TOML: {error}. Each line is a key and a value: data = "dolly"']
            ) from error
        for override in overrides:
            for key, value in _parse_override(override).items():
                old = values.get(key)
                values[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
        return cls.from_mapping(values)

    def to_toml(self) -> str:
        """All fields as TOML; `Settings.from_toml` gives back equal settings."""
        return tomli_w.dumps(dataclasses.asdict(self))

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        plain = Settings()
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        }

    def run_path(self, name: str) -> Path:
        """Where the run of that name lives."""
        return user_path(self.runs_dir) / name


def cache() -> Path:
    """Folder for what is made once a machine and can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bizassist_nb"


def user_path(text: str | Path) -> Path:
    """A path as a person writes it, ~ included; a ~name that is nobody's stays as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's own raises for such a name


def reference() -> list[tuple[str, str, str]]:
    """(name, default, text with the allowed range) of every field, for help texts and the documentation."""
    plain = Settings()
    return [
        (field.name, _shown(getattr(plain, field.name)), f"{field.metadata['text']} [{_allowed(field)}]")
        for field in dataclasses.fields(Settings)
    ]


def _toml(text: str) -> dict[str, Any]:
    """The values of a TOML text; ValueError says what is wrong with it."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except ValueError:  # of Python's own, which reads no such number
        raise ValueError("a number has thousands of digits") from None


def _problems(field: "dataclasses.Field[Any]", value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value.values() if isinstance(value, Mapping) else []
    if any(isinstance(text, str) and without_secrets(text) != text for text in texts):
        return [
            f"{field.name} = {_shown(value)}: holds a password or a token, which would be written into the run "
            "directory; leave it out (the hub's token is taken from HF_TOKEN or hf auth login)"
        ]
    if _fits(field, value):
        return []
    return [f"{field.name} = {_shown(value)}: has to be {_allowed(field)}"]


def _fits(field: "dataclasses.Field[Any]", value: Any) -> bool:
    limits = field.metadata
    if field.name == "columns":
        return isinstance(value, Mapping) and all(
            key in ROLES and isinstance(name, str) and name and _is_text(name) for key, name in value.items()
        )
    if limits["choices"]:
        return value in limits["choices"]
    if limits["least"] is None:
        return isinstance(value, str) and _is_text(value) and (bool(value.strip()) or field.name in _MAY_BE_EMPTY)
    if value in limits["words"]:
        return True
    kinds = (int, float) if field.type is float else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool) and limits["least"] <= value <= limits["most"]


def _is_text(value: str) -> bool:
    """Whether it can stand in a UTF-8 file: no NUL, no lone surrogates."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)


def _allowed(field: "dataclasses.Field[Any]") -> str:
    limits = field.metadata
    if field.name == "columns":
        return f"a table of column names, its keys among {_listed(ROLES)}"
    if limits["choices"]:
        return " or ".join(_shown(choice) for choice in limits["choices"])
    if limits["least"] is None:
        return "a text" if field.name in _MAY_BE_EMPTY else "a text that is not empty"
    kind = "a number" if field.type is float else "a whole number"
    words = "".join(f" or {_shown(word)}" for word in limits["words"])
    return f"{kind} from {limits['least']:g} to {limits['most']:,}{words}"


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"{_cut(without_secrets(key))}: there is no such setting; " + (
        f"did you mean {near[0]}?" if near else f"there are {_listed(known)}"
    )


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise SettingsError([f"{override!r}: an override is KEY=VALUE, for example rank=32"])
    try:
        found = _toml(f"{key} = {value}")
    except ValueError:
        found = {}
    if len(found) == 1:  # a value of several lines could be several settings
        return found
    head, dot, rest = key.partition(".")
    return {head: {rest: value}} if dot else {key: value}


def _shown(value: Any) -> str:
    """The value as it would stand in TOML, a long one cut."""
    if isinstance(value, str):
        shown = json.dumps(_cut(without_secrets(value)), ensure_ascii=False)
        return shown.encode("utf-8", "backslashreplace").decode()  # a lone surrogate could not be printed
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_shown(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, int) and abs(value) >= 10**80:
        return f"a number of {value.bit_length():,} bits"  # Python spells out no number of thousands of digits
    return f"{value:g}" if isinstance(value, float) else _cut(without_secrets(str(value)))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(str(item) for item in items)
