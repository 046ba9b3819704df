"""Uploading an adapter to the Hugging Face hub."""

import re

from bizassist_nb.errors import ModelError, RunError, brief
from bizassist_nb.runs import Run


def upload(run: Run, repo: str | None, *, private: bool = False) -> str:
    """Upload the run's adapter with its tokenizer and model card to OWNER/NAME; the address of the repository.

    The token is the one `hf auth login` or HF_TOKEN provides; it is never read or shown here.

    Raises:
        ModelError: if the run has no adapter.
        RunError: for an unusable name, without a token, or if the hub cannot be reached or refuses.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if run.adapter is None:
        raise ModelError(f"the run {run.name!r} has no adapter to upload (it is {run.status})")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo or ""):
        raise RunError(f"--repo {repo or '(missing)'}: name the hub repository as OWNER/NAME")
    files = {path.name: path for path in sorted(run.adapter.iterdir())}
    files |= {name: run.path / name for name in ("README.md", "loss.png") if (run.path / name).is_file()}
    api = HfApi()
    try:
        api.create_repo(str(repo), private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        api.create_commit(str(repo), operations, commit_message=f"Adapter of run {run.name}")
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        raise RunError(
            f"the upload to {repo} failed ({brief(error)}). "
            "Check the network, the name, and that you are logged in (hf auth login, or HF_TOKEN)"
        ) from error
    return f"{api.endpoint}/{repo}"
