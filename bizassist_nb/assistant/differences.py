"""Marking the words in which answers differ, in the HTML they were rendered to."""

import re
from difflib import SequenceMatcher
from typing import Final

_MARK: Final = '<mark style="background: #ffe3a3; color: #000000; text-decoration: underline">'
LEGEND: Final = f"<p>{_MARK}Marked</mark> words differ between base's answer and the other.</p>"
_MOST: Final = 1500
"""Words of an answer at most: comparing takes the product of both lengths, and the kernel waits."""
_BETWEEN: Final = re.compile(r"(<[^>]*>|\s+)")
"""What stands between words: a tag (cleaned HTML has no > within its attributes) or white space."""


def marked(first: str, second: str) -> tuple[str, str]:
    """Both pages of well-formed HTML, with every word marked that the other has not in its place.

    Pages of more than 1,500 words are given back as they are, and so are pages that have no word in common.
    """
    pages = [_BETWEEN.split(page) for page in (first, second)]  # a word, what stands between, a word, …
    places = [[i for i in range(0, len(page), 2) if page[i]] for page in pages]  # next to a tag the word is empty
    words = [[page[i] for i in where] for page, where in zip(pages, places, strict=True)]
    if max(map(len, words)) > _MOST:
        return first, second
    blocks = SequenceMatcher(None, words[0], words[1], autojunk=False).get_matching_blocks()
    for side, (page, where) in enumerate(zip(pages, places, strict=True)):
        same = {block[side] + i for block in blocks for i in range(block.size)}
        if not same:
            return first, second
        for number in set(range(len(where))) - same:
            page[where[number]] = f"{_MARK}{page[where[number]]}</mark>"
    return "".join(pages[0]), "".join(pages[1])
