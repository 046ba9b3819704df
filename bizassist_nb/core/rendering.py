"""Text from models, data and people, made safe to show as HTML; and sections of sentences and tables in three forms."""

import dataclasses
import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache

import nh3
from markdown_it import MarkdownIt

from bizassist_nb.core.errors import printable

# No images (fetching one tells its server who reads), no style, no forms.
_TAGS = {
    "p", "br", "hr", "strong", "em", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a",
    "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("js-default", {"html": False, "linkify": False})


def markdown(text: str) -> str:
    """Markdown rendered to HTML in which nothing can run or be fetched."""
    return nh3.clean(
        _parser().render(_whole(text)),
        tags=_TAGS,
        attributes={"a": {"href"}, "*": set()},
        url_schemes={"http", "https", "mailto"},
    )


def plain(text: str) -> str:
    """Text as it is, escaped, with its line breaks."""
    return f'<div style="white-space: pre-wrap; overflow-wrap: anywhere">{html.escape(_whole(text))}</div>'


def _whole(text: str) -> str:
    """The text without halves of characters (lone surrogates), which no message to a front end can carry."""
    return text.encode("utf-8", "replace").decode()


def plain_markdown(text: str) -> str:
    """Text as it is, on one line, within Markdown: no link, picture, formula, HTML or new cell comes of it."""
    line = re.sub(r"\s+", " ", _whole(text))
    return html.escape(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line), quote=False)


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """An HTML table of plain texts, aligned to the left."""
    cell = '<{0} style="text-align: left; vertical-align: top; padding: 2px 8px; white-space: pre-wrap">{1}</{0}>'
    lines = [(head, "th")] if head else []
    lines += [(row, "td") for row in rows]
    return "<table>" + "".join(
        "<tr>" + "".join(cell.format(tag, html.escape(_whole(text))) for text in row) + "</tr>" for row, tag in lines
    ) + "</table>"  # fmt: skip


def columns(heads: Sequence[str], bodies: Sequence[str]) -> str:
    """Columns side by side with plain heads and HTML bodies."""
    return grid(heads, [bodies])


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of HTML bodies in columns of one width under plain heads; a table, which code hosts' previews keep."""
    width = 100 // len(heads)
    top = "".join(f'<th style="text-align: left; width: {width}%">{html.escape(head)}</th>' for head in heads)
    cell = '<td style="text-align: left; vertical-align: top">{}</td>'
    lines = "".join(f"<tr>{''.join(map(cell.format, row))}</tr>" for row in rows)
    return f'<table style="width: 100%; table-layout: fixed"><tr>{top}</tr>{lines}</table>'


@dataclasses.dataclass(frozen=True)
class Section:
    """A title with sentences and a table of plain texts."""

    title: str
    lines: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Whether it is shown only to who opens it."""
    private: bool = False
    """Whether it holds texts of rows or answers, which do not belong into what is published."""


def sections_html(sections: Iterable[Section]) -> str:
    """Sections for a notebook; folded ones open at a click, without a kernel."""
    return "".join(
        f"<details><summary>{html.escape(section.title)}</summary>{body(section)}</details>"
        if section.folded
        else f"<p><b>{html.escape(section.title)}</b></p>{body(section)}"
        for section in sections
    )


def sections_text(sections: Iterable[Section]) -> str:
    """Sections for a terminal."""
    return "\n\n".join(
        "\n".join(
            filter(None, [section.title, *map(printable, section.lines), text_table([section.head, *section.rows])])
        )
        for section in sections
    )


def sections_markdown(sections: Iterable[Section]) -> str:
    """Sections for a model card."""
    return "\n\n".join(
        "\n\n".join(
            filter(None, [f"## {section.title}", *map(plain_markdown, section.lines), _markdown_table(section)])
        )
        for section in sections
    )


def text_table(rows: Sequence[Sequence[str]], most: int = 60) -> str:
    """Columns for a terminal, each as wide as its widest text, or `most` characters."""
    short = [[textwrap.shorten(printable(text), most, placeholder=" …") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*short, strict=True)]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)) for row in short]
    return "\n".join(line.rstrip() for line in lines)


def body(section: Section) -> str:
    """A section without its title."""
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in section.lines)
    return lines + (table(section.rows, section.head) if section.rows else "")


def _markdown_table(section: Section) -> str:
    rows = [section.head, ["---"] * len(section.head), *section.rows] if section.rows else []
    return "\n".join("| " + " | ".join(map(plain_markdown, row)) + " |" for row in rows)


def duration(seconds: float) -> str:
    """A time in words; none where a clock was set back in it."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
