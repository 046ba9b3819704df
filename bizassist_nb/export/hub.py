"""Uploading an adapter to the Hugging Face hub."""

import re

from bizassist_nb.core.errors import RunError, brief
from bizassist_nb.export.adapter import complete_adapter
from bizassist_nb.runs.run import RunDirectory


def upload(run: RunDirectory, repo: str | None, *, private: bool = False) -> str:
    """Upload the run's adapter with its tokenizer and model card to OWNER/NAME; the address of the repository.

    All of it becomes one commit. huggingface_hub shows the progress and tries again what fails for a moment; after an
    upload that was cut off, the next one does not send again what the hub has stored already. The token is the one that
    `hf auth login` or HF_TOKEN provides; it is never shown.

    Raises:
        ModelError: if the run has no adapter.
        RunError: for an unusable name, without a token, or if the hub cannot be reached or refuses.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo or ""):
        raise RunError(f"--repo {repo or '(missing)'}: name the hub repository as OWNER/NAME")
    folder = complete_adapter(run)
    api = HfApi()
    try:
        api.create_repo(str(repo), private=private, exist_ok=True)
        api.upload_folder(repo_id=str(repo), folder_path=folder, commit_message=f"Adapter of run {run.name}")
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
        reason = brief(error)  # a server may repeat what it was sent
        raise RunError(
            f"the upload to {repo} failed ({reason}). "
            "Check the network, the name, and that you are logged in (hf auth login, or HF_TOKEN); "
            "then upload again: what the hub has already is not sent twice"
        ) from None
    return f"{api.endpoint}/{repo}"
