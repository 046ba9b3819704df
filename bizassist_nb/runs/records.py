"""The records of a run directory: its events, its environment, its verdict, its answers and its votes.

They are checked when they are read: a disk may have damaged a file, or somebody may have edited it. msgspec names what
is wrong and where ("Expected `float`, got `str` - at `$.rows[3].base`"). Fields that older versions did not write have
defaults; fields that later versions add are ignored.
"""

from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar, dataclass_transform

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number of things; a longer one would be damage, and Python cannot even print it."""
Who = Literal["base", "tuned"]
Verdict = Literal["helped", "helped, at a cost", "no difference", "can't tell yet", "hurt"]
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)  # type checkers do not inherit these two
class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What JSON holds, as an immutable object."""


class Event(Record, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """One line of events.jsonl. The kind in the file is the class's name in lower case."""

    time: float = 0.0
    """Seconds since 1970, when it was written; 0 before that."""


class State(Event):
    """The run goes into another state, one of `runs.run.Status`."""

    state: str
    who: Who = "base"
    """Who is being scored, while that is the state."""


class Processes(Event):
    """The run trains in several processes."""

    count: Count


class Model(Event):
    """The base model, resolved."""

    name: str
    """As shown: "mistral-7b", "smollm2-135m", a hub id or a folder."""
    reason: str
    """Why this one."""
    source: str = ""
    """A hub id or the path of a folder, as transformers loads it."""
    revision: str = ""
    """The hub's commit, or a digest of a folder's weights; "" where it was not looked for (`models.base.pinned`)."""

    @property
    def commit(self) -> str | None:
        """The hub's commit, as transformers takes it."""
        return None if Path(self.source).is_dir() else self.revision or None


class Engine(Event):
    """The training engine was chosen."""

    name: str
    """"unsloth" or "transformers"."""
    reason: str
    end_to_end: bool = False
    """Whether rows go through laid end to end, without padding."""
    graphs: bool = False
    """Whether the GPU can replay whole passes as CUDA graphs (`bizassist_nb.training.cuda_graphs`)."""


class Lengths(Record):
    """What tokenising did to a set of rows; `truncated` counts those whose answer was cut at max_length."""

    rows: Count
    tokens: Count
    trained_tokens: Count
    median: Count
    longest: Count
    truncated: Count


class Rejected(Record):
    """A row that cannot be used, and why."""

    number: Count
    reason: str


class ShownRow(Record):
    """A training row of median length: pieces of its text, and whether each is learned."""

    number: Count
    runs: list[tuple[str, bool]]


class Data(Event):
    """The rows were read and tokenised; `rejected_rows` are the first of the `rejected`."""

    source: str
    training: Lengths
    held_out: Lengths
    rejected: Count
    rejected_rows: list[Rejected]
    shown: ShownRow
    fingerprint: str = ""
    usable: Count = 0
    validation: Count = 0
    """How many of the held-out rows are for validation; 0 where all are test rows."""
    warnings: list[str] = []
    """What a person should know of the rows that are not used, and what to do."""


class Plan(Event):
    """The steps of the whole run are known."""

    steps: Count
    tokens: Count = 0


class Preflight(Event):
    """What the run is expected to need (see `training.preflight.estimate`); sizes in GiB."""

    sentence: str
    peak: float = 0.0
    parts: dict[str, float] = {}
    free: float = 0.0
    memory: str = ""
    ram: float = 0.0
    disk: float = 0.0
    seconds: float | None = None


class Power(Event):
    """Which change of held-out loss the test rows will show (see `results.power`)."""

    rows: Count
    sentence: str
    change: float | None = None
    """Nats a token that are seen in 4 of 5 cases; None with too few rows for any."""


class Fit(Event):
    """How steps are cut up from the one after `step` on, and why."""

    micro_batch: Count
    """Rows that go through the model at once; it divides the batch size."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass, in steps that have no room to store them."""
    precision: str
    """dtype of arithmetic: "bfloat16", "float16" or "float32"."""
    reason: str
    step: Count = 0
    checkpoint_above: Count = msgspec.field(default=0, name="kept")
    """Micro-batches with more tokens than this are checkpointed; 0 means all of them."""
    graphs: bool = False
    """Whether passes without checkpointing are replayed as CUDA graphs."""
    unpacked: bool = False
    """With graphs: whether there is room for the base's matrices in 16 bits, too, which saves unpacking them."""


class Rate(Event):
    """The peak learning rate is decided; a resumed run keeps it."""

    learning_rate: float
    reason: str


class Parameters(Event):
    """The base has its adapter."""

    trainable: Count
    total: Count


class Sharded(Event):
    """The base is sharded over the processes: bytes of the first one's shard, and of the whole."""

    shard: Count = msgspec.field(name="held")
    whole: Count


class Step(Event):
    """One optimizer step."""

    step: Count
    """Counted from 1."""
    loss: float
    """Mean over the step's trained tokens, in nats."""
    learning_rate: float
    gradient_norm: float | None
    """Before clipping; None where it overflowed in float16 and the step was skipped."""
    tokens: Count
    """Input tokens of the step, without padding."""
    seconds: float
    """From the end of the step before, or from the start of training."""


class Evaluation(Event):
    """The held-out rows were scored after a step; 0 is the base."""

    step: Count
    loss: float
    who: Who = "tuned"
    rows: Count = 0
    seconds: float = 0.0


class Unscored(Event):
    """Memory ran out while the held-out rows were scored after a step."""

    step: Count
    reason: str


class Resumed(Event):
    """Training goes on after this step; later ones are done again."""

    step: Count


class Checkpoint(Event):
    """A checkpoint was saved."""

    step: Count
    spool: str | None = msgspec.field(default=None, name="kept")
    """The spool folder, if it could not be written into the run directory."""


class Ended(Event):
    """Training ended early after this step: the validation loss was lowest after step `best`."""

    step: Count
    best: Count


class Kept(Event):
    """The run saved the adapter of this step, the best, instead of the last."""

    step: Count


class Unanswered(Event):
    """The fixed prompts could not be answered."""

    reason: str


class Took(Event):
    """How long a part of the work took, in seconds."""

    what: str
    seconds: float


class Memory(Event):
    """The most memory that training took, in bytes."""

    peak: Count
    of: Literal["GPU", "process"] = "process"


class Away(Event):
    """The run directory cannot be written; what is done is spooled."""

    reason: str


class Back(Event):
    """The run directory can be written again, and has what was spooled."""


class Unsaved(Event):
    """Something could not be saved, and training went on without it."""

    what: str
    reason: str


class Damaged(Event):
    """A checkpoint, or the best adapter, in the folder `checkpoint` is not what was written."""

    checkpoint: str
    reason: str
    instead: str = "the one before it was used"


class Error(Event):
    """The run failed."""

    message: str
    expected: bool
    """Whether the message is the whole story; otherwise the log says more."""


class Stopping(Event):
    """A person asked the run to finish its step, save and end."""


class Killed(Event):
    """A person had the run's processes ended at once."""


class Parity(Record):
    """A merged model compared with the tuned assistant; None stands for what is not finite or not known."""

    passed: bool
    failures: list[str]
    tolerance: float
    """Allowed mean difference of the logits, as a share of their spread."""
    weight_tolerance: float
    """Allowed error of a weight, in roundings."""
    difference: float | None = None
    spread: float | None = None
    largest_logit_difference: float | None = None
    equal_next_tokens: float | None = None
    """Share of the positions."""
    positions: Count = 0
    equal_answers: Count = 0
    prompts: Count = 0
    largest_weight_error: float | None = None
    equal_template: bool = False
    equal_special_tokens: bool = False


class Merge(Event):
    """The merged model was written and compared; sizes in bytes, times in seconds."""

    parity: Parity
    base: Literal["trained", "original"] = "trained"
    bytes: Count = 0
    seconds: float = 0.0
    write_seconds: float = 0.0


class Gguf(Event):
    """The GGUF file was written."""

    bytes: Count
    seconds: float


_KINDS: Final = {kind.__name__.lower(): kind for kind in Event.__subclasses__()}


class Head(Record):
    """What an event of any kind has."""

    time: float
    event: str


def parse_event(line: bytes) -> Event | None:
    """The event in a line; None for a kind that this version does not know.

    Raises:
        ValueError: where it is damaged.
    """
    kind = _KINDS.get(decode(line, Head).event)
    return decode(line, kind) if kind else None


class Losses(Record):
    """What a model scores on some rows: loss in nats an answer token, tokens of the answers."""

    loss: float
    perplexity: float
    tokens: Count
    rows: Count


class Compared(Record):
    """Base and tuned on the same rows: tuned loss minus base loss, and rows on which tuned wins, ties or loses."""

    base: Losses
    tuned: Losses
    difference: float
    wins: Count
    ties: Count
    losses: Count

    @property
    def by_row(self) -> str:
        """On how many rows tuned is better, alike and worse, in words."""
        return f"{self.wins} better, {self.ties} alike, {self.losses} worse"


class Category(Compared):
    """Base and tuned on the rows of one category."""

    category: str


class RowLosses(Record):
    """One row, by its number in the source: its losses in nats an answer token, and tokens of the answer."""

    row: Count
    category: str
    question: str
    tokens: Count
    base: float
    tuned: float


class Judged(Compared):
    """Base and tuned on the same rows, with a verdict."""

    interval: tuple[float, float]
    """The 95 % interval of the difference."""
    verdict: Verdict
    categories: list[Category]
    """None where all rows are of one."""
    rows: list[RowLosses]
    standard_error: float | None = None
    groups: Count | None = None
    """Of rows that share a context: what the interval resamples."""


class AnswerCounts(Record):
    """How base and tuned answered the fixed prompts."""

    prompts: Count
    max_new_tokens: Count
    base: dict[str, Count]
    """Answers that "stopped" by themselves, that have each sign of a breakdown, and that are "sound" (have none)."""
    tuned: dict[str, Count]
    verdict: Verdict = "no difference"
    penalised: "AnswerCounts | None" = None
    """The same of the answers with a light repetition penalty."""


class Forgetting(Record):
    """How far tuned has moved from base, and the general questions with one answer that it lost or won.

    The KL divergence from base to tuned is in nats a token of the answers, its mean over the rows' answer tokens.
    """

    kl_held_out: float
    """On the test rows."""
    kl_general: float
    right_to_wrong: Count
    """Questions that base answers rightly, and tuned does not."""
    wrong_to_right: Count
    questions: Count
    """General questions that have one right answer."""


class Result(Judged, kw_only=True):
    """What evaluation.json holds: the held-out rows' comparison and its verdict in words, and the same for the general
    rows of other kinds, which show what was forgotten.
    """

    sentence: str
    notes: list[str]
    general: Judged
    answers: AnswerCounts | None
    prompted: Judged | None = None
    """Base with a few training rows as earlier turns of the chat, compared with tuned: `base` is the prompted base."""
    examples: tuple[Count, ...] = ()
    """Numbers of the training rows in that prompt."""
    forgetting: Forgetting | None = None


class Answer(Record):
    """One answer to a fixed prompt."""

    text: str
    stopped: bool
    """Whether it ended by itself."""
    signs: list[str]
    """Of a breakdown (see `results.degeneration.SIGNS`)."""


class Answers(Record):
    """The answers to one fixed prompt."""

    prompt: str
    base: Answer
    tuned: Answer
    penalised: tuple[Answer, Answer] | None = None
    """Base's and tuned's with a light repetition penalty."""


class BestScore(Record):
    """The best adapter so far: its held-out loss, in nats an answer token."""

    step: Count
    loss: float


class Heartbeat(Record):
    """A worker's last sign of life, for other machines, which do not see its lock.

    `boot` is another for each start of the machine; the worker started at `since`, in seconds since 1970 as `time`.
    """

    host: str
    boot: str
    since: float
    time: float


class Environment(Record):
    """What the run was trained with and on."""

    model: str
    data: str
    fingerprint: str
    device: str
    python: str
    versions: dict[str, str]
    source: str = ""
    engine: str = ""
    revision: str = ""
    """Of the base: the hub's commit, or a digest of a folder's weights (`models.base.pinned`)."""
    split: Count = 1
    """Which way its rows were split (`runs.rows`)."""


class Vote(Record):
    """One blind vote on the answers of base and tuned; time in seconds since 1970."""

    time: float
    question: str
    base: str
    tuned: str
    winner: Literal["base", "tuned", "tie", "bad"]
    left: Who
    """Whose answer stood on the left: a habit of the hand can be told from a preference."""


def decode(text: bytes, kind: type[T]) -> T:
    """JSON of that type.

    Raises:
        ValueError: if it is not; msgspec says what is wrong, and where.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
