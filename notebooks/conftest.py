"""The experiment's notebook reads Dolly, which cannot be had everywhere; in CI it always runs."""

import os

WITHOUT_DOLLY = not os.environ.get("BIZASSIST_DOLLY") and not os.environ.get("CI")
collect_ignore = ["mistral-business-assistant-lora.ipynb"] if WITHOUT_DOLLY else []


def pytest_report_header() -> str:
    """Say what is left out, and why."""
    return f"notebooks left out, BIZASSIST_DOLLY is not set: {collect_ignore}" if WITHOUT_DOLLY else ""
