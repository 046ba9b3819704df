"""What a page says, as a person reads it."""

import re


def read(page: str) -> str:
    """HTML without the tooltips that explain terms: a sentence with a term in it is in one piece."""
    return re.sub("</?abbr[^>]*>", "", page)
