"""The loss of given answers under a model: a run's held-out rows, and general ones."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any, Final

from bizassist_nb.assistant.loaded import loaded_base
from bizassist_nb.core.errors import out_of_memory
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import Row, read_table
from bizassist_nb.data.tokens import IGNORED, ChatTokenizer, Example
from bizassist_nb.models.adapters import adapter_folder
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.runs.rows import rows_of
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training.distributed.rank import scorers

_BATCH_LOGITS: Final = 4096 * 32768
"""Logits, padding included, that are computed at once: 4,096 tokens of Mistral's vocabulary, 0.5 GB in float32."""


def score(
    model: Any, examples: Sequence[Example], *, pad_id: int, between: Callable[[], None] = lambda: None
) -> list[Score]:
    """Each example's summed negative log-likelihood over its labelled tokens, in the order given.

    Where memory runs out, what is left goes on in batches of half the size, down to a row at a time; not where the base
    is sharded over several ranks, which must take the same batches: there each scores its share of every batch, and
    all have all scores. `between` is called between batches; what it raises ends the scoring.
    """
    rank = scorers()
    training = model.training
    model.eval()
    scores: dict[int, Score] = {}
    waiting = _batches(examples, range(len(examples)), _BATCH_LOGITS // model.config.vocab_size)
    try:
        while waiting:
            between()
            batch = waiting[0]
            mine = batch[rank.number :: rank.count]
            rows = mine or batch[:1]  # not to be counted, but the others need this rank's part of the weights
            found = _nats_or_less(model, [examples[i] for i in rows], pad_id, split=len(batch) > 1 and not rank.sharded)
            if found is None:
                half = len(batch) * len(examples[batch[-1]].input_ids) // 2
                waiting = _batches(examples, itertools.chain(*waiting), half)
                continue
            del waiting[0]
            for index, nats in zip(mine, found, strict=bool(mine)):
                example = examples[index]
                tokens = sum(label != IGNORED for label in example.labels[1:])
                scores[index] = Score(example.number, nats, tokens, example.category)
    finally:
        model.train(training)
        if rank.sharded:  # else embeddings stay gathered until something is saved, which is in the first rank alone
            model.reshard()
    everyone = {index: score for theirs in rank.all_gather(scores) for index, score in theirs.items()}
    return [everyone[index] for index in range(len(examples))]


class EvaluationSet:
    """What base and tuned are scored on: a run's held-out rows, and general rows of other kinds, which show what was
    forgotten. Those ship with the package and are not cut where training rows are, so all runs have the same.
    """

    def __init__(self, chat: ChatTokenizer, settings: Settings, rows: Sequence[Row], held_out: Sequence[Example]):
        """`rows` are the held-out ones, and `held_out` those of them that can be used, tokenised."""
        with resources.as_file(resources.files("bizassist_nb.data") / "samples" / "general.jsonl") as path:
            general = read_table(str(path)).rows
        self.held_out = list(held_out)
        self.general, _ = chat.examples(
            general, system_prompt=settings.system_prompt, max_length=max(1024, settings.max_length)
        )
        self._pad_id, self._seed = chat.pad_id, settings.seed
        self._questions = [{row.number: row.instruction for row in some} for some in (rows, general)]

    def on_held_out(self, model: Any, between: Callable[[], None] = lambda: None) -> list[Score]:
        """Scores of the held-out rows."""
        return score(model, self.held_out, pad_id=self._pad_id, between=between)

    def on_general(self, model: Any, between: Callable[[], None] = lambda: None) -> list[Score]:
        """Scores of the general rows."""
        return score(model, self.general, pad_id=self._pad_id, between=between)

    def result(
        self,
        base: tuple[list[Score], list[Score]],
        tuned: tuple[list[Score], list[Score]],
        answers: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """What evaluation.json holds (see `results.verdict.assess`), from (held-out, general) scores of each."""
        held_out, general = (
            judge(b, t, seed=self._seed, questions=asked)
            for b, t, asked in zip(base, tuned, self._questions, strict=True)
        )
        return assess(held_out, general, answers)


def evaluate(run: RunDirectory) -> dict[str, Any]:
    """Score base and tuned anew and have both answer the fixed prompts, all with plain transformers; evaluation.json,
    answers.json and the run's model card are written anew, too.

    Raises:
        ModelError: if the run has no adapter.
        DataError: if its rows cannot be read.
        RunError: if they are not those it began with.
    """
    settings = run.settings
    adapter_folder(run)  # what cannot be done is said before anything heavy is loaded
    _, _, rows = rows_of(run)

    from bizassist_nb.assistant.decoding import scaled
    from bizassist_nb.results.model_card import write_card
    from bizassist_nb.training.fixed_prompts import answer_run

    loaded = loaded_base(run.model)
    adapter = loaded.adapter(run)
    held, _ = loaded.chat.examples(rows, system_prompt=settings.system_prompt, max_length=settings.max_length)
    evaluation_set = EvaluationSet(loaded.chat, settings, rows, held)
    loaded.use([adapter])
    with scaled(loaded.model, {}):
        base = evaluation_set.on_held_out(loaded.model), evaluation_set.on_general(loaded.model)
    tuned = evaluation_set.on_held_out(loaded.model), evaluation_set.on_general(loaded.model)
    result = evaluation_set.result(base, tuned, answer_run(run))
    write_json(run.path / "evaluation.json", result)
    write_card(run)
    return result


def _batches(examples: Sequence[Example], which: Iterable[int], tokens: int) -> list[list[int]]:
    """The indices `which` of examples, by rising length, at most so many tokens a batch, or a single longer one."""
    batches: list[list[int]] = []
    for index in sorted(which, key=lambda index: len(examples[index].input_ids)):
        # Lengths rise, so the newest is the batch's longest.
        if not batches or (len(batches[-1]) + 1) * len(examples[index].input_ids) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _nats_or_less(model: Any, examples: Sequence[Example], pad_id: int, *, split: bool) -> list[float] | None:
    """`_nats`; None where memory ran out and the examples may be `split`."""
    import torch

    try:
        # Not inference_mode: a sharded base would keep what it gathers in, which training could not use.
        with torch.no_grad():
            return _nats(model, examples, pad_id)
    except (RuntimeError, MemoryError) as error:
        if not split or not out_of_memory(error):
            raise
    # Only now, when the error is gone and with it the frames that hold the batch's tensors.
    torch.cuda.empty_cache()
    return None


def _nats(model: Any, examples: Sequence[Example], pad_id: int) -> list[float]:
    """Summed negative log-likelihood of each, from one pass over all of them."""
    import torch

    width = max(len(example.input_ids) for example in examples)

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        rows = [ids + [value] * (width - len(ids)) for ids in lists]
        return torch.tensor(rows, device=model.device)

    ids = padded([example.input_ids for example in examples], pad_id)
    labels = padded([example.labels for example in examples], IGNORED)
    mask = padded([[1] * len(example.input_ids) for example in examples], 0)
    # Only positions that predict an answer need the vocabulary's worth of logits.
    first = int((labels != IGNORED).any(dim=0).nonzero()[0]) - 1
    keep = width - max(first, 0)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
    targets = labels[:, -keep + 1 :]
    # Flat, because over a dimension that is not the last torch sums float32 naively on a CPU: 1e-4 nats a token off.
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].to(exact).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return [float(nats) for nats in losses.double().sum(dim=1)]
