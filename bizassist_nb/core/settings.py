"""The settings of a run: one frozen dataclass whose fields say what they mean, in which unit and range.

The text of a field is written once, here; the command line's help, the widgets' tooltips and the
reference in the documentation are made from it.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tomli_w

from bizassist_nb.core.errors import SettingsError, cut, without_secrets

ROLES: Final = ("instruction", "context", "response", "category")
"""What the columns of a data set are for; `Settings.columns` maps these to the data's own names."""
TURNS: Final = ("user", "assistant")
"""What `Settings.template` makes of a record."""
COLUMN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
"""A column's name in a template, as the group; {{ and }} stand for braces."""

DEMO: Final = 'data = "sample"\nsubset = 96\nheld_out = 24\nmax_length = 512\n'
"""Settings of the demo: a few minutes on two CPU cores, without a network."""
UNNAMED: Final = "…"
"""Stands for data that a person has yet to name."""
PRESETS: Final = {
    "Try it: 2 minutes": (
        "the embedded model on a few sample rows: on two CPU cores it is ready to answer within 3 minutes",
        'model = "smollm2-135m"\ndata = "sample"\nsubset = 12\nheld_out = 12\nmax_length = 256\nbatch_size = 2\n',
    ),
    "The experiment": ("Mistral-7B on 1,000 rows of Dolly; it needs a GPU", 'model = "mistral-7b"\n'),
    "My data": ("rows of your own: a file, a folder, or a data set of the hub", f'data = "{UNNAMED}"\n'),
}
"""Names of settings to begin with, what they are for, and the settings."""
NAMES: Final = (
    "auto", "mistral-7b", "qwen3-4b", "llama-3.2-3b", "smollm3-3b", "gemma-3-1b", "smollm2-135m", "dolly", "sample",
)  # fmt: skip
"""Models and data that have names of their own here."""
ALL_LINEAR: Final = "all-linear"
_AUTO: Final = "auto"
_FEWEST_SPLIT: Final = 3
"""Held-out rows of which one can be for validation, and two for the test."""
_MAY_BE_EMPTY: Final = ("system_prompt", "accelerate_config", "config", "revision", "system")


def setting(default: Any, text: str, between: tuple[float, float] | None = None, others: tuple[Any, ...] = ()) -> Any:
    """A field with its help text and its allowed values.

    `between` is an inclusive range of numbers, or of whole numbers if its ends are whole. `others`, and a default that
    is a text or truth value, are allowed words. Without a range and `others` any text is allowed. A table (`dict`) has
    `others` for its keys, and texts for values.
    """
    least, most = between or (None, None)
    words = (default, *others) if isinstance(default, str | bool) and (between or others) else ()
    metadata = {"text": text, "least": least, "most": most, "words": words if between else (), "choices": ()}
    if not between:
        metadata["choices"] = words
    if default is dict:
        metadata["keys"] = others
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run does.

    Raises:
        SettingsError: naming every field at fault with its value and what is allowed.
    """

    model: str = setting(
        _AUTO,
        f'base model: {", ".join(NAMES[1:6])}, smollm2-135m (the embedded one), a hub id or a local folder; "bizassist '
        'models" says more; "auto" takes mistral-7b where a CUDA GPU has room for it, else smollm2-135m',
    )
    data: str = setting(
        "dolly",
        'rows to learn from: "dolly" (Databricks Dolly 15k), "sample" (120 rows that ship with the package), '
        "the path of a .jsonl (also .gz, .zst), .json, .csv, .parquet or .xlsx file, or of a folder of files of one "
        'kind; a hub data set\'s id, or "hf://datasets/owner/name@revision/file.jsonl"; in a cell "{df}" is the table '
        "in that variable",
    )
    config: str = setting("", 'configuration (subset) of a hub data set; "" for its only one')
    split: str = setting("train", "split of a hub data set")
    revision: str = setting("", 'branch, tag or commit of a hub data set; "" for its newest')
    columns: Mapping[str, str] = setting(
        dict,
        "which column of the data is the instruction, context, response or category, where the names are not "
        'recognised: { instruction = "question", response = "answer" }',
        others=ROLES,
    )
    template: Mapping[str, str] = setting(
        dict,
        "what the user and the assistant say, written with the names of the data's columns, where a column alone is "
        'not the question: { user = "Classify: {text}", assistant = "{label}" }; {{ and }} stand for braces',
        others=TURNS,
    )
    subset: int = setting(1000, "rows to train on, drawn by a seeded shuffle", (1, 10_000_000))
    seed: int = setting(42, "seed of the shuffle, of the adapter's start and of training", (0, 2**32 - 1))
    system_prompt: str = setting(
        "You are an assistant for product development, business decisions and the use of AI in companies.",
        'what the model is told before each question, in training and in chat; "" for nothing',
    )
    rank: int = setting(16, "LoRA rank: width of the adapter; more learns more and takes more memory", (1, 512))
    alpha: int = setting(16, "LoRA alpha: the adapter's output is multiplied by alpha / rank", (1, 4096))
    rslora: bool = setting(False, "multiply by alpha / sqrt(rank) instead: 4 times as much at rank 16", others=(True,))
    target_modules: str = setting(
        ALL_LINEAR,
        'linear layers that get an adapter: "all-linear" is every one in the decoder blocks; or their names, separated '
        'by commas: "q_proj, v_proj"',
    )
    dropout: float = setting(0.0, "share of the adapter's inputs dropped in training", (0.0, 0.9))
    epochs: int = setting(1, "times each training row is seen", (1, 1000))
    learning_rate: float | str = setting(
        _AUTO,
        'peak learning rate (see scheduler); "auto" is 2e-4 for a 7B model (hidden size 4,096), more for a narrower '
        "one: 9.3e-4 for smollm2-135m",
        (1e-8, 1.0),
    )
    scheduler: str = setting("linear", "how the learning rate falls from its peak to 0", others=("cosine", "constant"))
    weight_decay: float = setting(0.0, "share of each adapter weight that a step takes off, times the rate", (0.0, 1.0))
    warmup_steps: int | str = setting(
        _AUTO,
        'steps in which the learning rate rises to its peak; "auto" is 8 % of all steps, at most 20',
        (0, 1_000_000),
    )
    max_length: int = setting(2048, "tokens a row may have; the end of a longer answer is cut", (16, 1_048_576))
    batch_size: int = setting(4, "examples a step learns from", (1, 4096))
    micro_batch: int | str = setting(
        _AUTO,
        "examples that go through the model at once; a divisor of batch_size, smaller takes less memory; "
        '"auto" takes the least time of those whose longest rows fit',
        (1, 4096),
    )
    train_on: str = setting(
        "response",
        'tokens that are learned: those of the "response" with its end token, which is every answer of a conversation; '
        'of the "last" answer alone; or "all"',
        others=("last", "all"),
    )
    held_out: int = setting(
        64,
        "rows kept out of training, on which base and tuned are scored; the same for every seed and subset",
        (2, 100_000),
    )
    evaluate_every: int | str = setting(
        _AUTO,
        'steps between scores of the held-out rows in training; "auto" has trained on three times as many rows as it '
        "scores between two of them (on each GPU, as one scores for all unless the base is sharded), which takes "
        "about a tenth of the time",
        (1, 1_000_000),
    )
    keep: str = setting(
        "last",
        'adapter that the run saves: the "last" one, or the "best" on the validation rows, which are a third of the '
        "held-out ones and have no part in the verdict",
        others=("best",),
    )
    stop_early: int = setting(
        0,
        "training ends when the loss on the validation rows has not reached a new low for so many scores (see "
        "evaluate_every); 0 trains to the last step. Validation rows are a third of the held-out ones, as with keep",
        (0, 1000),
    )
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints", (0.0, 1440.0))
    engine: str = setting(
        _AUTO,
        'what trains: "unsloth", or plain "transformers" with PEFT; "auto" takes unsloth where it is '
        "installed and works on this device, and transformers on a Hopper GPU or later, where its passes are CUDA "
        "graphs",
        others=("unsloth", "transformers"),
    )
    gpus: int | str = setting(
        _AUTO,
        'GPUs of this machine to train on; "auto" is one if there is one, "all" is every one there is; they share the '
        "examples of a step, so batch_size has to be a multiple of their number",
        (1, 1024),
        others=("all",),
    )
    accelerate_config: str = setting(
        "",
        "file that `accelerate config` wrote, for several machines or FSDP; in place of gpus it says how many "
        'processes train; "" for none',
    )
    report_to: str = setting(
        "none",
        "an installed tracker that is sent losses, learning rates and settings; tensorboard's are in RUN/tensorboard",
        others=("trackio", "wandb", "tensorboard"),
    )
    runs_dir: str = setting("runs", "folder in which each run has its own folder")

    def __post_init__(self) -> None:
        """Check every field, and what only holds between fields."""
        problems = wrong_fields(self)
        if not any(problem.startswith(("batch_size ", "micro_batch ", "gpus ")) for problem in problems):
            problems += self._uneven(self.gpus) if isinstance(self.gpus, int) else self._uneven(1)
        if self.template and (twice := sorted({"instruction", "response"} & self.columns.keys())):
            problems.append(f"columns = {_shown(self.columns)}: template makes {' and '.join(twice)}; leave them out")
        wrong = any(problem.startswith(("held_out ", "keep ", "stop_early ")) for problem in problems)
        if not wrong and self.validates and self.held_out < _FEWEST_SPLIT:
            problems.append(
                f'held_out = {self.held_out}: has to be at least {_FEWEST_SPLIT} beside keep = "best" or stop_early, '
                "which take a third of the rows for validation"
            )
        if self.accelerate_config and self.gpus != _AUTO:
            problems.append(
                f'gpus = {_shown(self.gpus)}: leave it "auto" beside accelerate_config, which has num_processes for it'
            )
        if problems:
            raise SettingsError(problems)

    @property
    def validates(self) -> bool:
        """Whether the held-out rows are split: validation rows choose the adapter, test rows give the verdict."""
        return self.keep == "best" or self.stop_early > 0

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
                f"it can be {', '.join(str(d) for d in range(1, each + 1) if each % d == 0)}"
            ]
        return []

    @classmethod
    def from_toml(cls, text: str, overrides: Iterable[str] = ()) -> "Settings":
        """Settings from a TOML text, with `key=value` overrides applied after it.

        The value of an override is TOML too; one that is not (`data=rows.csv`) is taken as the text it is.
        """
        try:
            values = _toml(text.removeprefix("\ufeff"))
        except ValueError as error:
            number = re.search(r"at line (\d+)", str(error))
            line = f": {_line(text, int(number[1]))}" if number else ""
            raise SettingsError(
                [f'this is not TOML: {error}{line}. Each line is a key and a value: data = "dolly"']
            ) from error
        for override in overrides:
            for key, value in _parse_override(override).items():
                old = values.get(key)
                values[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
        known = [field.name for field in dataclasses.fields(cls)]
        problems = [_unknown(key, known, text) for key in values if key not in known]
        try:
            settings = cls(**{key: value for key, value in values.items() if key in known})
        except SettingsError as error:
            raise SettingsError([*problems, *error.problems]) from None
        if problems:
            raise SettingsError(problems)
        return settings

    def to_toml(self) -> str:
        """All fields as TOML; `Settings.from_toml` gives back equal settings."""
        return tomli_w.dumps(dataclasses.asdict(self))

    def rooted(self) -> "Settings":
        """The same with absolute paths, which hold in any working directory."""
        places: dict[str, Any] = {
            name: str(user_path(getattr(self, name)).absolute())
            for name in ("model", "data", "accelerate_config")
            if _is_place(getattr(self, name))
        }
        return dataclasses.replace(self, **places)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        plain = vars(Settings())
        return {name: value for name, value in vars(self).items() if value != plain[name]}

    def run_path(self, name: str) -> Path:
        """Where the run of that name lives."""
        return user_path(self.runs_dir) / name


def cache() -> Path:
    """Folder for what is made once a machine and can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bizassist_nb"


def user_path(text: str | Path) -> Path:
    """A path as a person writes it, ~ included; a ~name that is nobody's stays as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's own raises for such a name


def _is_place(text: str) -> bool:
    """Whether a setting names something on this disk, and is no name with a meaning of its own."""
    with contextlib.suppress(OSError):  # of a text that no path can be
        return bool(text) and text not in NAMES and user_path(text).exists()
    return False


def reference() -> list[tuple[str, str, str]]:
    """(name, default, text with the allowed range) of every field, for help texts and the documentation."""
    plain = Settings()
    return [
        (field.name, _shown(getattr(plain, field.name)), f"{field.metadata['text']} [{allowed(field)}]")
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


def wrong_fields(values: Any) -> list[str]:
    """What is wrong with the fields of a dataclass that `setting` made, a line for each at fault."""
    found = [(field, getattr(values, field.name)) for field in dataclasses.fields(values)]
    return [
        f"{field.name} = {_shown(value)}: {problem}" for field, value in found if (problem := _problem(field, value))
    ]


def _problem(field: "dataclasses.Field[Any]", value: Any) -> str:
    texts = [value] if isinstance(value, str) else value.values() if isinstance(value, Mapping) else []
    if any(isinstance(text, str) and without_secrets(text) != text for text in texts):
        return (
            "holds a password or a token, which would be written into the run directory; leave it out (the hub's token "
            "is taken from HF_TOKEN or hf auth login)"
        )
    return "" if _fits(field, value) else f"has to be {allowed(field)}"


def _fits(field: "dataclasses.Field[Any]", value: Any) -> bool:
    limits = field.metadata
    if value is None:
        return field.default is None
    if keys := limits.get("keys"):
        if not isinstance(value, Mapping) or not all(
            key in keys and isinstance(text, str) and text and _is_text(text) for key, text in value.items()
        ):
            return False
        return keys is not TURNS or not value or all(any(COLUMN.findall(value.get(key, ""))) for key in keys)
    if limits["choices"]:
        return value in limits["choices"] and type(value) is type(limits["choices"][0])  # 0 is not false
    if isinstance(field.default, tuple):
        return isinstance(value, tuple) and all(isinstance(text, str) and text and _is_text(text) for text in value)
    if limits["least"] is None:
        return isinstance(value, str) and _is_text(value) and (bool(value.strip()) or field.name in _MAY_BE_EMPTY)
    if value in limits["words"]:
        return True
    kinds = (int, float) if isinstance(limits["least"], float) else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool) and limits["least"] <= value <= limits["most"]


def _is_text(value: str) -> bool:
    """Whether it can stand in a UTF-8 file: no NUL, no lone surrogates."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)


def allowed(field: "dataclasses.Field[Any]") -> str:
    """The values that a field may have, in words."""
    limits = field.metadata
    if field.name == "columns":
        return f'a table of column names, its keys among {", ".join(ROLES)}: {{ instruction = "question" }}'
    if field.name == "template":
        return (
            'a table of user and assistant, each with a {column}: { user = "Classify: {text}", assistant = "{label}" }'
        )
    if limits["choices"]:
        return " or ".join(_shown(choice) for choice in limits["choices"])
    if isinstance(field.default, tuple):
        return "a tuple of texts that are not empty"
    if limits["least"] is None:
        return "a text" if field.name in _MAY_BE_EMPTY else "a text that is not empty"
    kind = "a number" if isinstance(limits["least"], float) else "a whole number"
    words = "".join(f" or {_shown(word)}" for word in limits["words"])
    return f"{kind} from {limits['least']:g} to {limits['most']:,}{words}"


def _line(text: str, number: int) -> str:
    """The text's line of that number, from 1 on, for a message; TOML's line may be one more than the text has."""
    return repr(cut(without_secrets("".join(text.split("\n")[number - 1 : number]).strip())))


def _unknown(key: str, known: Sequence[str], text: str) -> str:
    begins = re.compile(rf"[\s\"'\[]*{re.escape(key)}\b")
    number = next((number for number, line in enumerate(text.split("\n"), 1) if begins.match(line)), 0)
    where = f" (line {number}, {_line(text, number)})" if number else ""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{cut(without_secrets(key))}{where}: there is no such setting; " + (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
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
        shown = json.dumps(cut(without_secrets(value)), ensure_ascii=False)
        return shown.encode("utf-8", "backslashreplace").decode()  # a lone surrogate could not be printed
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_shown(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**80:
        return f"a number of {value.bit_length():,} bits"  # Python spells out no number of thousands of digits
    return f"{value:g}" if isinstance(value, float) else cut(without_secrets(str(value)))
