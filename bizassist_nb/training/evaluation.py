"""The loss of held-out answers under a model."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from bizassist_nb.data.rows import read_table, split
from bizassist_nb.data.tokens import IGNORED, Example
from bizassist_nb.runs import Run, write_json
from bizassist_nb.verdict import Score, compare

_BATCH_LOGITS: Final = 4096 * 32768
"""Logits, padding included, that are computed at once: 4,096 tokens of Mistral's vocabulary, 0.5 GB in float32."""


def score(
    model: Any, examples: Sequence[Example], *, pad_id: int, between: Callable[[], None] = lambda: None
) -> list[Score]:
    """Each example's summed negative log-likelihood over its labelled tokens, in the order given.

    `between` is called between batches; what it raises ends the scoring.
    """
    import torch

    training = model.training
    model.eval()
    scores: dict[int, Score] = {}
    try:
        for batch in _batches(examples, _BATCH_LOGITS // model.config.vocab_size):
            between()
            with torch.inference_mode():
                for index, nats in zip(batch, _nats(model, [examples[i] for i in batch], pad_id), strict=True):
                    example = examples[index]
                    scores[index] = Score(
                        example.number, nats, sum(label != IGNORED for label in example.labels[1:]), example.category
                    )
    finally:
        model.train(training)
    return [scores[index] for index in range(len(examples))]


def evaluate(run: Run) -> dict[str, Any]:
    """Score base and tuned anew on the run's held-out rows, with plain transformers, and write evaluation.json.

    Raises:
        ModelError: if the run has no adapter.
        DataError: if its rows cannot be read.
    """
    from bizassist_nb.assistant.bases import loaded_base
    from bizassist_nb.assistant.decoding import scaled

    settings = run.settings
    loaded = loaded_base(run.environment.get("model", settings.model))
    adapter = loaded.adapter(run)
    table = read_table(settings.data, settings.columns)
    _, rows = split(table.rows, subset=settings.subset, held_out=settings.held_out, seed=settings.seed)
    held, _ = loaded.chat.examples(rows, system_prompt=settings.system_prompt, max_length=settings.max_length)
    loaded.use([adapter])
    with scaled(loaded.model, {}):
        base = score(loaded.model, held, pad_id=loaded.chat.pad_id)
    tuned = score(loaded.model, held, pad_id=loaded.chat.pad_id)
    result = compare(base, tuned, seed=settings.seed)
    write_json(run.path / "evaluation.json", result)
    return result


def _batches(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """Indices of examples of like length, at most so many tokens a batch, or a single longer one."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    batches: list[list[int]] = [[]]
    for index in order:  # lengths rise, so the newest is the batch's longest
        if batches[-1] and (len(batches[-1]) + 1) * len(examples[index].input_ids) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _nats(model: Any, examples: Sequence[Example], pad_id: int) -> list[float]:
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
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return [float(nats) for nats in losses.double().sum(dim=1)]
