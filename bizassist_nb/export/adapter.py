"""The adapter's folder, made fit to be given away."""

from pathlib import Path

from bizassist_nb.core.errors import ModelError
from bizassist_nb.core.files import write_atomic, write_json
from bizassist_nb.models.adapters import adapter_config
from bizassist_nb.results.model_card import base_name, card
from bizassist_nb.runs.run import RunDirectory


def complete_adapter(run: RunDirectory) -> Path:
    """Make the run's adapter fit to be given away: with a model card and the loss curve, and no path of this machine.

    Raises:
        ModelError: if the run has no adapter.
    """
    if run.adapter is None:
        raise ModelError(f"the run {run.name!r} has no adapter to export (it is {run.status})")
    config = adapter_config(run.adapter)
    write_json(run.adapter / "adapter_config.json", config | {"base_model_name_or_path": base_name(run)})
    write_atomic(run.adapter / "README.md", lambda part: part.write_text(card(run), "utf-8"))
    if (run.path / "loss.png").is_file():
        write_atomic(run.adapter / "loss.png", lambda part: part.write_bytes((run.path / "loss.png").read_bytes()))
    return run.adapter
