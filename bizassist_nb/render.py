"""Text from models, data and people, made safe to show as HTML."""

import html
from collections.abc import Iterable, Sequence
from functools import cache

import nh3
from markdown_it import MarkdownIt

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


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """An HTML table of plain texts, aligned to the left."""
    cell = '<{0} style="text-align: left; vertical-align: top">{1}</{0}>'
    lines = [(head, "th")] if head else []
    lines += [(row, "td") for row in rows]
    return "<table>" + "".join(
        "<tr>" + "".join(cell.format(tag, html.escape(text)) for text in row) + "</tr>" for row, tag in lines
    ) + "</table>"  # fmt: skip


def columns(heads: Sequence[str], bodies: Sequence[str]) -> str:
    """Columns side by side with plain heads and HTML bodies; a table, which code hosts' previews keep."""
    width = 100 // len(heads)
    top = "".join(f'<th style="text-align: left; width: {width}%">{html.escape(head)}</th>' for head in heads)
    bottom = "".join(f'<td style="text-align: left; vertical-align: top">{body}</td>' for body in bodies)
    return f'<table style="width: 100%; table-layout: fixed"><tr>{top}</tr><tr>{bottom}</tr></table>'
