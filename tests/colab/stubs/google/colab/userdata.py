"""Secrets, of which there are none."""

from google.colab.errors import Error


class SecretNotFoundError(Error):
    pass


class NotebookAccessError(Error):
    pass


class TimeoutException(Error):  # noqa: N818 - Colab's name for it
    pass


def get(key):
    raise SecretNotFoundError(f"Secret {key} does not exist.")
