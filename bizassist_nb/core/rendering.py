"""HTML and Markdown of text from models, data and people, made safe; and sections: sentences with a table."""

import base64
import dataclasses
import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

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
        set_tag_attribute_values={"a": {"target": "_blank"}},  # the page may be a notebook with unsaved work
    )


def plain(text: str) -> str:
    """Text as it is, escaped, with its line breaks."""
    return f'<div style="white-space: pre-wrap; overflow-wrap: anywhere">{html.escape(_whole(text))}</div>'


def _whole(text: str) -> str:
    """The text without halves of characters (lone surrogates), which no message to a front end can carry."""
    return text.encode("utf-8", "replace").decode()


def untypeset(page: str) -> str:
    """A cell's HTML output in which JupyterLab (`mathjax_ignore`) and notebook 6 (`tex2jax_ignore`) see no formulas.

    Without this, "$49 to $99" becomes a formula, and `\\href` in it a link.
    """
    return f'<div class="mathjax_ignore tex2jax_ignore">{page}</div>'


def plain_markdown(text: str) -> str:
    """Text as it is, on one line, within Markdown: no link, picture, formula, HTML or new cell comes of it."""
    line = html.escape(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", re.sub(r"\s+", " ", _whole(text))), quote=False)
    # JupyterLab typesets what is left of an escaped $ or \( unless an element parts it from the rest.
    return re.sub(r"\\[\\$]", r"<span>\g<0></span>", line)


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """An HTML table of plain texts, aligned to the left."""
    cell = '<{0} style="text-align: left; vertical-align: top; padding: 2px 8px; white-space: pre-wrap">{1}</{0}>'
    lines = [(head, "th")] if head else []
    lines += [(row, "td") for row in rows]
    return "<table>" + "".join(
        "<tr>" + "".join(cell.format(tag, html.escape(_whole(text))) for text in row) + "</tr>" for row, tag in lines
    ) + "</table>"  # fmt: skip


def image(png: bytes, text: str) -> str:
    """A PNG image within the page, with a text for those who cannot see it."""
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def bar(share: float) -> str:
    """A progress bar of training; `share` is from 0 to 1."""
    return (
        f'<div role="progressbar" aria-label="training" aria-valuenow="{100 * share:.0f}" style="max-width: 640px; '
        f'background: #8884"><div style="width: {share:.1%}; height: 8px; background: #1f83c4"></div></div>'
    )


def grid(heads: Sequence[str], *rows: Sequence[str]) -> str:
    """Rows of HTML bodies in columns of one width, scrolled together, under plain heads: a table shows everywhere."""
    width = 100 // len(heads)
    top = "".join(f'<th style="text-align: left; width: {width}%">{html.escape(head)}</th>' for head in heads)
    cell = '<td style="text-align: left; vertical-align: top">{}</td>'
    lines = "".join(f"<tr>{''.join(map(cell.format, row))}</tr>" for row in rows)
    table = f'<table style="width: 100%; min-width: {220 * len(heads)}px; table-layout: fixed">'
    return f'<div style="overflow-x: auto">{table}<tr>{top}</tr>{lines}</table></div>'


class Opening(NamedTuple):
    """What a section begins with: in a terminal, as HTML, and as Markdown."""

    text: str
    page: str
    card: str


@dataclasses.dataclass(frozen=True, repr=False)
class Section:
    """A title, which may be empty, with sentences and a table of plain texts, for a notebook and for a terminal."""

    title: str
    lines: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    folded: bool = False
    """Whether a reader has to open it: at a click in a notebook, without a kernel."""
    private: bool = False
    """Whether it has texts of rows or answers, which a model card leaves out."""
    widest: int = 60
    """Characters of a column in a terminal."""
    opening: Opening | None = None
    """What people see first; in a notebook the table is then folded."""

    def __repr__(self) -> str:
        """Plain text."""
        table = text_table([self.head, *self.rows] if self.head else self.rows, self.widest) if self.rows else ""
        opening = self.opening.text if self.opening else ""
        return "\n".join(filter(None, [self.title, opening, *map(printable, self.lines), table]))

    def _repr_html_(self) -> str:
        return untypeset(self.page())

    def page(self) -> str:
        """HTML to be put into a page."""
        title, lines = html.escape(self.title), "".join(f"<p>{html.escape(line)}</p>" for line in self.lines)
        figures = table(self.rows, self.head) if self.rows else ""
        if self.opening:
            lines, figures = self.opening.page + lines, folded("the figures", figures)
        body = lines + figures
        if self.folded:
            return folded(title, body)
        return f"<p><b>{title}</b></p>{body}" if title else body

    def card(self) -> str:
        """Markdown, for a model card."""
        rows = [markdown_table(self.head, self.rows)] if self.rows else []
        opening = [self.opening.card] if self.opening else []
        return "\n\n".join([f"## {self.title}", *opening, *map(plain_markdown, self.lines), *rows])


def folded(title: str, body: str) -> str:
    """HTML that a reader opens, without a kernel, by a click on its title, which is HTML, too."""
    return f"<details><summary>{title}</summary>{body}</details>"


def text_table(rows: Sequence[Sequence[str]], most: int) -> str:
    """Columns for a terminal, each as wide as its widest text, but at most `most` characters."""
    short = [[textwrap.shorten(printable(text), most, placeholder=" …") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*short, strict=True)]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)) for row in short]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(plain_markdown, line)) + " |" for line in lines)


def losses(base: float, tuned: float) -> tuple[str, str, str]:
    """Two losses and the change from the first to the second, for a table."""
    return f"{base:.3f}", f"{tuned:.3f}", f"{tuned - base:+.3f}"


def duration(seconds: float) -> str:
    """A time in words; 0 s if the clock was set back meanwhile."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
