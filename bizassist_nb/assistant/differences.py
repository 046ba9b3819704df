"""Marking the words in which answers differ, in the HTML they were rendered to."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html.parser import HTMLParser
from typing import Final

_MARK: Final = '<mark style="background: none; color: inherit; border-bottom: 2px dotted #b35900">'
_MOST: Final = 1500
"""Words of an answer at most: comparing takes the product of both lengths, and the kernel waits."""


def marked(first: str, second: str) -> tuple[str, str]:
    """Both pages of well-formed HTML, with every word marked that the other has not in its place.

    Pages of more than 1,500 words are given back as they are, and so are pages that have no word in common.
    """
    pages = [_Pieces(first), _Pieces(second)]
    words = [page.words for page in pages]
    if max(map(len, words)) > _MOST:
        return first, second
    matcher = SequenceMatcher(None, words[0], words[1], autojunk=False)
    differing: tuple[set[int], set[int]] = (set(), set())
    for kind, begin, end, other_begin, other_end in matcher.get_opcodes():
        if kind != "equal":
            differing[0].update(range(begin, end))
            differing[1].update(range(other_begin, other_end))
    if any(len(some) == len(all_) for some, all_ in zip(differing, words, strict=True)):
        return first, second
    return pages[0].with_marks(differing[0]), pages[1].with_marks(differing[1])


class _Pieces(HTMLParser):
    """A page as pieces: markup, white space and words, which put together are the page again."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self._pieces: list[tuple[str, bool]] = []  # (text, whether it is a word)
        self.feed(page)
        self.close()

    @property
    def words(self) -> Sequence[str]:
        return [text for text, is_word in self._pieces if is_word]

    def with_marks(self, numbers: set[int]) -> str:
        """The page with the words of these numbers marked."""
        out, count = [], -1
        for text, is_word in self._pieces:
            count += is_word
            out.append(f"{_MARK}{text}</mark>" if is_word and count in numbers else text)
        return "".join(out)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._pieces.append((self.get_starttag_text() or "", False))

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag: str) -> None:
        self._pieces.append((f"</{tag}>", False))

    def handle_data(self, data: str) -> None:
        self._pieces += [(piece, not piece.isspace()) for piece in re.findall(r"\s+|\S+", data)]

    def handle_entityref(self, name: str) -> None:
        self._pieces.append((f"&{name};", True))

    def handle_charref(self, name: str) -> None:
        self._pieces.append((f"&#{name};", True))
