"""The model card of a run: model, data, results, and how to load it."""

import dataclasses
import json
from pathlib import Path
from typing import Final

from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.rendering import markdown_table, plain_markdown
from bizassist_nb.data.sources import DOLLY, kind
from bizassist_nb.models import base as models
from bizassist_nb.models.named import NAMED
from bizassist_nb.results.summary import facts, how_to_go_on, settings_rows
from bizassist_nb.results.verdict_card import sections
from bizassist_nb.results.verdict_figure import save_png
from bizassist_nb.runs import records
from bizassist_nb.runs.run import RunDirectory

_ASK: Final = """
messages = [
{system}    {{"role": "user", "content": "How should we price a new feature?"}},
]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs.to(model.device), max_new_tokens=256, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_LOAD_ADAPTER: Final = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

here = "."  # this folder, or the hub's name for it
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
base = AutoModelForCausalLM.from_pretrained({base}, quantization_config=nf4, device_map="auto")
model = PeftModel.from_pretrained(base, here)
tokenizer = AutoTokenizer.from_pretrained(here)"""
_LOAD_MERGED: Final = """
from transformers import AutoModelForCausalLM, AutoTokenizer

here = "."  # this folder, or the hub's name for it
model = AutoModelForCausalLM.from_pretrained(here, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(here)"""


def write_card(run: RunDirectory) -> None:
    """Write the run's README.md, and the verdict's picture beside it."""
    save_png(run, run.path)
    write_atomic(run.path / "README.md", lambda part: part.write_text(card(run), "utf-8"))


def card(run: RunDirectory, parity: records.Parity | None = None) -> str:
    """A YAML head and Markdown: the card of the adapter or, if `parity` is given, of the merged model."""
    from huggingface_hub import ModelCard, ModelCardData

    base, data = base_name(run), run.settings.data
    licence = NAMED[run.model].licence if run.model in NAMED else None
    head = ModelCardData(
        base_model=base if "/" in base else None,  # the hub accepts only its own names here
        library_name="transformers" if parity else "peft",
        pipeline_tag="text-generation",
        tags=["bizassist-nb", "lora", "qlora"],
        license=None if not licence else "apache-2.0" if licence == "Apache-2.0" else "other",
        license_name=None if licence in (None, "Apache-2.0") else licence,
        language=["en"] if data in ("dolly", "sample") else None,
        datasets=[DOLLY] if data == "dolly" else [data] if _on_hub(data) else None,
    )
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(_paragraphs(run, parity)) + "\n"))


def _paragraphs(run: RunDirectory, parity: records.Parity | None) -> list[str]:
    environment, base, data = run.environment, base_name(run), run.settings.data
    # Paths are private, so only names are shown.
    data = Path(data).name if kind(Path(data)) or Path(data).is_absolute() else data
    shown = {"model": base, "data": data, "accelerate_config": Path(run.settings.accelerate_config).name}
    settings = [(name, shown.get(name, value)) for name, value in settings_rows(run) if name != "runs_dir"]
    versions = {"Python": environment.python, **environment.versions}
    what = "A LoRA adapter for" if parity is None else "A LoRA adapter merged in 16 bits into"
    system = json.dumps(run.settings.system_prompt, ensure_ascii=False)
    message = f'    {{"role": "system", "content": {system}}},\n' if run.settings.system_prompt else ""
    load = _LOAD_ADAPTER.format(base=json.dumps(base, ensure_ascii=False)) if parity is None else _LOAD_MERGED
    results = [
        dataclasses.replace(section, lines=[line.replace(f"{run.path}/", "") for line in section.lines]).card()
        for section in sections(run)
        if not section.private
    ]
    known = [(label, text.replace(environment.data, data).replace(run.model, base)) for label, text in facts(run)]
    made = [
        *(f"- **{label}**: {plain_markdown(text)}" for label, text in known),
        f"- **licence of the data**: {_licence(run.settings.data)}",
        f"- **device**: {plain_markdown(environment.device)}",
        f"- **versions**: {plain_markdown(', '.join(f'{name} {version}' for name, version in versions.items()))}",
    ]
    return [
        f"# {plain_markdown(run.name)}",
        f"{what} {plain_markdown(base)}, trained with bizassist-nb.",
        *(results or [f"## Did it help?\n\nNot scored yet: {how_to_go_on(run) or run.status}."]),
        *([] if parity is None else ["## Is it the model that was scored?", parity_words(parity)]),
        "## How it was made",
        "\n".join(made),
        markdown_table(("setting", "value"), settings),
        "## How to use it",
        f"```python{load}{_ASK.format(system=message)}\n```",
        *(["![loss](loss.png)"] if parity is None else []),
    ]


def parity_words(parity: records.Parity) -> str:
    """What the comparison of a merged model with the tuned assistant found."""
    return (
        f"It was loaded again and compared with the tuned model on {parity.prompts} held-out prompts: "
        f"{parity.equal_next_tokens:.1%} of {parity.positions} next tokens and {parity.equal_answers} answers "
        f"are the same, the largest difference of two logits is {parity.largest_logit_difference:.3g}; template and "
        "special tokens are the same."
    )


def base_name(run: RunDirectory) -> str:
    """The base's hub id; for a local folder its name without the path, which is private."""
    name = run.model
    return models.HUB_IDS.get(name, name if _on_hub(name) else Path(name).name)


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists() and not kind(Path(name))


def _licence(data: str) -> str:
    if data == "dolly":
        return "CC BY-SA 3.0 (Databricks Dolly 15k)"
    if data == "sample":
        return "Apache-2.0 (the sample rows of bizassist-nb)"
    return "see the data set's page on the hub" if _on_hub(data) else "not known to bizassist-nb; ask the data's owner"
