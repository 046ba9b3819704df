"""The loss of given answers under a model, and how far base and tuned are apart on them."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bizassist_nb.data.tokens import IGNORED, Example
from bizassist_nb.results.verdict import Score
from bizassist_nb.training.distributed.rank import this_rank
from bizassist_nb.training.memory import in_halves

if TYPE_CHECKING:
    from bizassist_nb.assistant.prefix_cache import Layers

T = TypeVar("T")
Answered = tuple[Any, Any]
"""Logits and labels of the tokens that are scored, of shapes (tokens, vocabulary) and (tokens)."""
Off = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes tuned answer as base, for as long as the context lasts."""
_BATCH_LOGITS: Final = 4096 * 32768
"""Logits, padding included, that are computed at once: 4,096 tokens of Mistral's vocabulary, 0.5 GB in float32."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row under base and under tuned."""

    base: Score
    tuned: Score
    divergence: float
    """KL divergence from base to tuned in nats, summed over the answer's tokens."""
    likeliest: tuple[list[bool], list[bool]]
    """Of each token of the answer whether base, and whether tuned, would have given it."""


def score(
    model: Any, examples: Sequence[Example], *, pad_id: int, between: Callable[[], None] = lambda: None
) -> list[Score]:
    """Each example's summed negative log-likelihood over its labelled tokens, in the order given.

    What all begin with is read once. Of several ranks each scores its share of every batch, and all have all scores.
    `between` is called between batches; what it raises ends the scoring.
    """
    with _scoring(model):
        prefix = _read(model, examples)

        def scored(some: list[Example]) -> list[Score]:
            return [_score(*each) for each in zip(some, _answers(model, some, pad_id, prefix), strict=True)]

        return _of_each(model, examples, scored, between)


def pairs(
    model: Any, off: Off, examples: Sequence[Example], *, pad_id: int, between: Callable[[], None] = lambda: None
) -> list[Pair]:
    """Each example under base and under tuned, as `score` has them, with how far they are apart."""
    with _scoring(model):
        with off():
            read_by_base = _read(model, examples)
        read_by_tuned = _read(model, examples)

        def both(some: list[Example]) -> list[Pair]:
            with off():
                base = _answers(model, some, pad_id, read_by_base)
            tuned = _answers(model, some, pad_id, read_by_tuned)
            return [
                Pair(_score(example, b), _score(example, t), _divergence(b[0], t[0]), (_likeliest(*b), _likeliest(*t)))
                for example, b, t in zip(some, base, tuned, strict=True)
            ]

        return _of_each(model, examples, both, between)


def _read(model: Any, examples: Sequence[Example]) -> "Layers":
    """Keys and values of what all examples begin with, but for the last token before an answer, which predicts it."""
    from bizassist_nb.assistant.prefix_cache import read

    asked = [one.input_ids[: max(0, one.labels.count(IGNORED) - 1)] for one in examples]
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*asked, strict=False))
    return read(model, [token for token, *_ in alike])


def _score(example: Example, answer: Answered) -> Score:
    import torch

    logits, labels = answer
    # Row by row: over a dimension that is not the last torch sums float32 naively on a CPU, 1e-4 nats a token off.
    losses = torch.nn.functional.cross_entropy(_exact(logits), labels, reduction="none")
    return Score(example.number, float(losses.double().sum()), len(labels), example.category)


@contextlib.contextmanager
def _scoring(model: Any) -> Iterator[None]:
    """The model in the mode to be scored, and then in the one it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if this_rank().sharded:  # else embeddings stay gathered until something is saved, which rank 0 alone does
            model.reshard()


def _of_each(
    model: Any, examples: Sequence[Example], measure: Callable[[list[Example]], list[T]], between: Callable[[], None]
) -> list[T]:
    """What `measure` finds of each example, in the order given: of fewer at once where memory runs out."""
    rank = this_rank()
    found: dict[int, T] = {}
    for batch in batches_of(examples, rank.count * _BATCH_LOGITS // model.config.vocab_size):
        between()
        # A rank without rows scores one that is not counted: others may need its part of the weights.
        measured = rank.shared([examples[i] for i in batch], lambda some: in_halves(measure, some or [examples[0]]))
        found |= zip(batch, measured, strict=True)
    return [found[index] for index in range(len(examples))]


def batches_of(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """The indices of examples, by rising length, at most so many tokens a batch, or a single longer one."""
    batches: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids)):
        # Lengths rise, so the newest is the batch's longest.
        if not batches or (len(batches[-1]) + 1) * len(examples[index].input_ids) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _answers(model: Any, examples: Sequence[Example], pad_id: int, prefix: "Layers | None" = None) -> list[Answered]:
    """Each example's labelled tokens, from one pass; `prefix` has the keys and values of what all begin with."""
    import torch

    from bizassist_nb.assistant.prefix_cache import begun

    known = prefix[0][0].shape[2] if prefix else 0
    width = max(len(example.input_ids) for example in examples)

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        rows = [ids + [value] * (width - len(ids)) for ids in lists]
        return torch.tensor(rows, device=model.device)

    ids = padded([example.input_ids for example in examples], pad_id)
    labels = padded([example.labels for example in examples], IGNORED)
    mask = padded([[1] * len(example.input_ids) for example in examples], 0)
    scored = labels[:, 1:] != IGNORED
    keep = scored.shape[1] - int(scored.any(dim=0).nonzero()[0])
    wanted = scored[:, -keep:]
    cache = {"past_key_values": begun(model, prefix, len(examples))} if prefix else {}
    # Positions that predict an answer are all that the vocabulary's worth of logits is computed of.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0][:, :-1][wanted],))
    try:
        with torch.no_grad():  # not inference_mode: a sharded base would keep what it gathers in, unfit for training
            logits = model(
                input_ids=ids[:, known:], attention_mask=mask, logits_to_keep=keep + 1, use_cache=bool(prefix), **cache
            ).logits
    finally:
        hook.remove()
    if logits.dim() > 2:  # Unsloth multiplies with the head's weights itself
        logits = logits[:, :-1][wanted]
    counts = scored.sum(dim=1).tolist()
    return list(zip(torch.split(logits, counts), torch.split(labels[:, 1:][scored], counts), strict=True))


def _divergence(base: Any, tuned: Any) -> float:
    """KL divergence from base to tuned, summed over the tokens."""
    before, after = (_exact(logits).log_softmax(dim=-1) for logits in (base, tuned))
    return float((before.exp() * (before - after)).sum(dim=-1).double().sum())


def _likeliest(logits: Any, labels: Any) -> list[bool]:
    found: list[bool] = (logits.argmax(dim=-1) == labels).tolist()
    return found


def _exact(logits: Any) -> Any:
    """Logits in float32 at least."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))
