"""The adapter's folder, made fit to be given away, and its upload to the Hugging Face hub."""

import re
from pathlib import Path

from bizassist_nb.core.errors import RunError, brief
from bizassist_nb.core.files import write_atomic, write_json
from bizassist_nb.models.adapters import adapter_folder, read_config
from bizassist_nb.results.model_card import base_name, card
from bizassist_nb.results.verdict_figure import save_png
from bizassist_nb.runs.run import RunDirectory


def complete_adapter(run: RunDirectory) -> Path:
    """Make the run's adapter fit to be given away: with a model card and its pictures, and no path of this machine.

    Raises:
        ModelError: if the run has no adapter.
    """
    folder, curve = adapter_folder(run), run.path / "loss.png"
    write_json(folder / "adapter_config.json", read_config(folder) | {"base_model_name_or_path": base_name(run)})
    write_atomic(folder / "README.md", lambda part: part.write_text(card(run), "utf-8"))
    save_png(run, folder)
    if curve.is_file():
        write_atomic(folder / "loss.png", lambda part: part.write_bytes(curve.read_bytes()))
    return folder


def upload(run: RunDirectory, repo: str | None, *, private: bool = False) -> str:
    """Upload the run's adapter with its tokenizer and model card to OWNER/NAME; the address of the repository.

    It is one commit. huggingface_hub shows the progress and retries what fails for a moment; after an upload that was
    cut off, the next one sends only what the hub has not stored yet. The token is the one that `hf auth login` or
    HF_TOKEN provides; it is never shown.

    Raises:
        ModelError: if the run has no adapter.
        RunError: for an unusable name, without a token, if the hub cannot be reached or refuses, or if the repository
            is to be private and exists as a public one.
    """
    import httpx
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo or ""):
        raise RunError(f"--repo {repo or '(missing)'}: name the hub repository as OWNER/NAME")
    folder = complete_adapter(run)
    api = HfApi()
    try:
        api.create_repo(str(repo), private=private, exist_ok=True)
        if private and not api.model_info(str(repo)).private:  # one that exists stays as it is, without a word
            raise RunError(
                f"{repo} is on the hub already and is public, so nothing was uploaded; make it private in its settings "
                "there, name another repository, or leave out private"
            )
        api.upload_folder(repo_id=str(repo), folder_path=folder, commit_message=f"Adapter of run {run.name}")
    except (OSError, httpx.HTTPError, ValueError) as error:
        raise RunError(
            f"the upload to {repo} failed ({brief(error)}). "
            "Check the network, the name, and that you are logged in (hf auth login, or HF_TOKEN); "
            "then upload again: what the hub has already is not sent twice"
        ) from None  # a server may repeat what it was sent
    return f"{api.endpoint}/{repo}"
