"""The model card of a run: what was trained, on what, and what came of it."""

from bizassist_nb.render import sections_markdown
from bizassist_nb.report import facts, how_to_go_on, settings_rows
from bizassist_nb.runs import Run, write_whole
from bizassist_nb.scorecard import sections


def write_card(run: Run) -> None:
    """Write the run's README.md."""
    write_whole(run.path / "README.md", lambda part: part.write_text(card(run), "utf-8"))


def card(run: Run) -> str:
    """The model card as Markdown with the hub's YAML head."""
    environment = run.environment
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {_base(environment['source'], environment['model'])}",
        "pipeline_tag: text-generation",
        "tags: [lora, qlora, bizassist-nb]",
        "---",
        f"# {run.name}",
        "",
        f"A LoRA adapter for {environment['model']}, trained with bizassist-nb.",
        "",
        sections_markdown(section for section in sections(run) if not section.private)
        or f"## Did it help?\n\nNot scored yet: {how_to_go_on(run) or run.status}.",
        "",
        "## How it was made",
        "",
        *(f"- **{label}**: {text}" for label, text in facts(run)),
        f"- **device**: {environment['device']}",
        f"- **versions**: Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {_cell(value)} |" for name, value in settings_rows(run)),
        "",
        "## How to use it",
        "",
        "```python",
        "from bizassist_nb import Assistant, open_run",
        f'Assistant(open_run("{run.name}")).ask("How should we price a new feature?")',
        "```",
        "",
        "![loss](loss.png)",
        "",
    ]
    return "\n".join(lines)


def _base(source: str, name: str) -> str:
    """A hub id, as the hub's card format wants it; the embedded model's is the one it was converted from."""
    if name == "smollm2-135m":
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return source if "/" in source and not source.startswith("/") else name


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
