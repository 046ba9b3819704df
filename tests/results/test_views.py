"""What is shown as HTML: nothing in it may run, be fetched, or break out of its place."""

import re
from html.parser import HTMLParser
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from bizassist_nb.api import Run
from bizassist_nb.assistant.comparison import Comparison, Comparisons, comparison_html
from bizassist_nb.assistant.differences import marked
from bizassist_nb.core import rendering
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.degeneration import counted
from bizassist_nb.results.summary import run_html
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><b onclick=x>&lt;"


FETCHING = {
    "script", "style", "link", "base", "meta", "img", "svg", "math", "picture", "audio", "video", "iframe", "object",
    "embed", "form", "input", "button", "textarea",
}  # fmt: skip


class Seen(HTMLParser):
    """The tags, attributes and text of an HTML text, as a browser's parser meets them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.other: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.other.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment

    @property
    def schemes(self) -> set[str]:
        """Of all links, as a browser reads them; "" of relative ones."""
        return {urlsplit(value or "").scheme for name, value in self.attributes if name == "href"}


def check_harmless(html: str) -> Seen:
    seen = Seen(html)
    assert set(seen.tags) <= rendering._TAGS - FETCHING
    assert {name for name, _ in seen.attributes} <= {"href", "rel", "target"}
    assert seen.schemes <= {"http", "https", "mailto", ""}
    assert not seen.other
    return seen


HOSTILE = [
    "<script>alert(1)</script>",
    "<SCRIPT SRC=//x.y/z.js></SCRIPT >",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "</p></td></table><script>alert(1)</script>",
    "<p onclick=alert(1) onmouseover='alert(1)'>text</p>",
    "<b/onclick=alert(1)>b",
    '<img src=x onerror="alert(1)">',
    "<img src='http://tracker.example/pixel.gif'>",
    "![pixel](http://tracker.example/pixel.gif)",
    "![pixel](javascript:alert(1))",
    "![pixel][x]\n\n[x]: http://tracker.example/pixel.gif",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](data:image/svg+xml;base64,PHN2Zz4=)",
    "[x](data:image/png;base64,AAAA)",
    "[x](file:///etc/passwd)",
    "[x](ftp://a.b/c) [y](//a.b/c)",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "<javascript:alert(1)>",
    '[x](http://a.b "title\\" onmouseover=alert(1)")',
    "[x](http://a.b/'onmouseover=alert(1)//)",
    '<a href="javascript:alert(1)">x</a>',
    "<svg onload=alert(1)><animate attributeName=href values=javascript:alert(1) /></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    "<object data=javascript:alert(1)></object><embed src=javascript:alert(1)>",
    "<style>body { background: url(http://tracker.example) }</style>",
    '<div style="position:fixed; inset:0; background:url(http://tracker.example)">over all</div>',
    "<link rel=stylesheet href=http://tracker.example><base href=//x><meta http-equiv=refresh content=0>",
    "<form action=http://x><input name=password><button>Send</button></form>",
    "<!-- comment --><?php x ?><!DOCTYPE html><![CDATA[x]]>",
    "<!--><script>alert(1)</script>-->",
    "```<script>\nalert(1)\n```\n\n`<script>`",
    '```"><script>alert(1)</script>\ncode\n```',
    "| a | b |\n|---|:-:|\n| <script> | ![x](y) |",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;script&#62;",
    "**bold *both [link](  <unclosed",
    "[[[[[[](((((",
    "<",
    "",
    "\0<script\0>alert(1)</script>\0",
    "\u202e<script>\u202dalert(1)\u2066\u2067\u2069",
    "\ufeff\u200b\u2028\u2029<script>",
    "＜script＞ ‹script› ʺ",
    "<script " * 20,
    *(part * (30_000 // len(part)) for part in ("a", "<b>", "<", ">", "*", "[", "`", "- ", "> ", "![](", "&#", "|\n")),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:24]))
def test_hostile_markdown_becomes_harmless_html(text):
    check_harmless(rendering.markdown(text))


MARKS = st.sampled_from([*"<>\"'`*[]()!&;:/\\|#-= \n\t\0ab", "script", "javascript:", "data:", "on", "x=y"])


@settings(deadline=None)
@given(st.lists(MARKS).map("".join))
def test_markdown_of_any_marks_is_harmless(text):
    check_harmless(rendering.markdown(text))


def test_markdown_is_rendered():
    html = rendering.markdown(
        "# Plan\n\n1. **first** and `x < y`\n2. ~~old~~ *new*\n\n> said\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "[link](https://a.b/c?d=1&e=2) [mail](mailto:a@b.c)\n\n```python\nif a < b:\n```"
    )
    seen = check_harmless(html)
    assert {"h1", "ol", "li", "strong", "code", "s", "em", "blockquote", "table", "td", "a", "pre"} <= set(seen.tags)
    assert ("href", "https://a.b/c?d=1&e=2") in seen.attributes
    assert ("target", "_blank") in seen.attributes  # not in the page: it may be a notebook with unsaved work
    assert "x < y" in seen.text
    assert "if a < b:" in seen.text


def test_html_in_markdown_is_shown_as_the_text_it_is():
    assert (
        check_harmless(rendering.markdown(SCRIPT.replace("&lt;", ""))).text.strip().startswith("<script>alert(1)</scri")
    )


def no_tags_but(html: str, *tags: str) -> Seen:
    seen = Seen(html)
    assert set(seen.tags) <= set(tags)
    assert not {name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href")}
    return seen


def test_plain_text_is_shown_as_it_is():
    text = f"{SCRIPT}\n  two\n**no bold**"
    assert no_tags_but(rendering.plain(text), "div").text == text


def test_plain_markdown_parts_what_makes_a_formula():
    text = r"$49 to \$99 \(x\) \\begin{align} a_b"
    html = MarkdownIt().render(rendering.plain_markdown(text))
    assert Seen(html).text.strip() == text
    assert not re.search(r"\$[^<]|\\[^<]", html)


def test_a_bar_tells_a_screen_reader_a_number():
    assert ("aria-valuenow", "50") in Seen(rendering.bar(0.5)).attributes


def test_table_escapes_its_texts():
    seen = no_tags_but(rendering.table([[SCRIPT, "b"], ["c", SCRIPT]], [SCRIPT, "head"]), "table", "tr", "th", "td")
    assert seen.text == f"{SCRIPT}head{SCRIPT}bc{SCRIPT}"
    assert seen.tags.count("th") == 4
    assert seen.tags.count("td") == 8


def test_columns_escape_their_heads_and_keep_their_bodies():
    html = rendering.grid([SCRIPT, "tuned"], ["<p>one</p>", rendering.plain(SCRIPT)])
    seen = no_tags_but(html, "table", "tr", "th", "td", "p", "div")
    assert seen.text == f"{SCRIPT}tunedone{SCRIPT}"


FRAME = {"b", "i", "div", "table", "tr", "th", "td"}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("text", [SCRIPT, *HOSTILE[:50]], ids=lambda text: ascii(text[:24]))
def test_comparison_of_hostile_answers_is_harmless(text, finished):
    comparison = Comparison(text, {"base": text, "tuned": text}, ("run<script>",), note=text)
    html = comparison_html(comparison, finished=finished)
    seen = Seen(html)
    assert set(seen.tags) <= FRAME | rendering._TAGS
    assert {name for name, _ in seen.attributes} <= {"style", "class", "href", "rel", "target"}
    assert seen.schemes <= {"http", "https", "mailto", ""}
    assert not seen.other
    # Nothing in the text closes the frame: one table of two columns, and no cell more than it has.
    frame = Seen(html.replace(rendering.markdown(text), ""))
    assert [frame.tags.count(tag) for tag in ("table", "tr", "th", "td")] == [2, 4, 4, 4]
    assert "tuned (run<script>)" in seen.text
    if finished:
        assert comparison._repr_html_() == html


def test_comparison_shows_only_the_answers_there_are():
    assert Seen(Comparison("q ", {"base": "one"})._repr_html_()).text == "q baseone\n"
    assert Seen(Comparison("q ", {"tuned": "two"}, ("r",))._repr_html_()).text == "q tuned (r)two\n"
    both = Comparison("q ", {"base": "one", "tuned": "two"}, cut=("tuned",), limit=5, note=" why")
    assert Seen(both._repr_html_()).text == "q basetuned, stopped at the limit of 5 tokensone\ntwo\n why"


def test_words_that_differ_are_marked_in_both_answers_on_demand():
    answers = {"base": "Start *with* a price of 5 & ask", "tuned": "Start *with* a test of 5 & ask **them**"}
    page = Comparison("q", answers)._repr_html_()
    plain, _, folded = page.partition("<details><summary>show which words differ</summary>")
    legend, _, words = folded.partition("</p>")
    assert "<mark" not in plain
    assert Seen(legend).text == "Marked words differ between base's answer and the other."
    assert re.findall(r"<mark[^>]*>(.*?)</mark>", words) == ["price", "test", "them"]
    said = "basetunedStart with a price of 5 & ask\nStart with a test of 5 & ask them\n"
    assert (Seen(plain).text, Seen(words).text) == (f"q{said}", said)
    assert "<details" not in Comparison("q", dict.fromkeys(answers, "alike"))._repr_html_()


@pytest.mark.parametrize("other", ["nothing alike", "", "word " * 1501])
def test_answers_without_a_word_in_common_and_long_ones_are_not_marked(other):
    assert "<mark" not in Comparison("q", {"base": "Start with a price", "tuned": other})._repr_html_()


@pytest.mark.parametrize("text", [SCRIPT, *HOSTILE[:50]], ids=lambda text: ascii(text[:24]))
def test_marks_only_add_marks(text):
    first, second = rendering.markdown(f"same {text} one"), rendering.markdown(f"same two {text}")
    for page, page_marked in zip((first, second), marked(first, second), strict=True):
        assert re.sub(r"</?mark[^>]*>", "", page_marked) == page


def test_markdown_of_a_comparison_is_inert():
    text = "a ``` fence\n````\n<script>alert(1)</script> [x](javascript:alert(1))"
    html = MarkdownIt().render(Comparison(text, {"base": text, "tuned": "b"})._repr_markdown_())
    assert Seen(html).text.count(text) == 2
    assert set(Seen(html).tags) == {"pre", "code", "p", "strong"}


def test_comparisons_are_columns_for_a_data_frame():
    each = Comparisons(Comparison(f"q{n}", {"base": f"b{n}", "tuned": f"t{n}"}, ("r",)) for n in range(2))
    columns = each.to_dict()
    assert columns["question"] == ["q0", "q1"]
    assert columns["tuned"] == ["t0", "t1"]
    assert {len(values) for values in columns.values()} == {2}
    assert [Seen(each._repr_html_()).tags.count(tag) for tag in ("table", "tr", "td")] == [2, 6, 12]


def test_an_answer_cut_short_is_said_to_be_in_its_own_row():
    answers = {"base": "b", "tuned": "t"}
    each = Comparisons(
        [Comparison("q0", answers, ("r",)), Comparison("q1", answers, ("r",), 1.0, ("tuned",), "a note", limit=7)]
    )
    first, second = each._repr_html_().split("q1")
    assert ("limit of" in first, second.count("stopped at the limit of 7 tokens"), second.count("a note")) == (
        False,
        1,
        1,
    )
    assert each[1]._repr_markdown_().endswith("\n\na note")


def test_run_escapes_all_it_shows(tmp_path):
    settings = Settings(data=SCRIPT, model=SCRIPT, system_prompt=SCRIPT, columns={"context": SCRIPT})
    (tmp_path / "settings.toml").write_text(settings.to_toml(), "utf-8")
    journal = Journal(tmp_path)
    lengths = {"rows": 2, "tokens": 9, "trained_tokens": 5, "median": 4, "longest": 5, "truncated": 1}
    bad = [{"number": 3, "reason": SCRIPT}]
    for kind in (records.Model, records.Engine):
        journal.write(kind(name=SCRIPT, reason=SCRIPT))
    found = {"rejected": 1, "rejected_rows": bad, "shown": {"number": 1, "runs": [(SCRIPT, False), (SCRIPT, True)]}}
    journal.write(records.Data(source=SCRIPT, training=lengths, held_out=lengths, **found))
    journal.write(records.Plan(steps=2))
    journal.write(records.Step(step=1, loss=1.0, learning_rate=0.1, gradient_norm=None, tokens=1, seconds=1.0))
    journal.write(records.Error(message=SCRIPT, expected=False))
    journal.write(records.State(state="failed"))
    (tmp_path / "worker.log").write_text(SCRIPT)
    scores = (
        [Score(1, 9.0, 3, SCRIPT), Score(2, 6.0, 3, "other")],
        [Score(1, 3.0, 3, SCRIPT), Score(2, 7.0, 3, "other")],
    )
    compared = judge(*scores, seed=0, questions={1: SCRIPT})
    answer = records.Answer(text=SCRIPT, stopped=True, signs=[])
    answers = [records.Answers(prompt=SCRIPT, base=answer, tuned=answer)]
    write_json(tmp_path / "answers.json", answers)
    write_json(
        tmp_path / "evaluation.json",
        msgspec.structs.replace(assess(compared, compared, counted(answers, 9)), sentence=SCRIPT),
    )
    html = run_html(Run(tmp_path))
    picture = ("abbr", "span", "svg", "rect", "path", "polyline", "circle", "text")
    seen = no_tags_but(html, "p", "b", "div", "pre", "table", "tr", "th", "td", "details", "summary", "mark", *picture)
    # Model and engine with a reason each, source, rejected row, the row shown twice, error, log, sentence, and three of
    # the settings (the fourth, columns, stands there as Python writes it); the category of held-out and of general
    # rows, the most improved question, and a prompt with two answers.
    assert seen.text.count(SCRIPT) == 20
    assert Run(tmp_path)._repr_html_() == html


def test_sections_are_the_same_in_html_text_and_markdown():
    section = rendering.Section("Title", ("One <b>.",), ("", "base"), (("a|b\n<i>", "1"),))
    seen = no_tags_but(section.page(), "p", "b", "table", "tr", "th", "td")
    assert seen.text == "TitleOne <b>.basea|b\n<i>1"
    assert repr(section) == "Title\nOne <b>.\n         base\na|b <i>  1"
    assert section.card() == ("## Title\n\nOne &lt;b&gt;.\n\n|  | base |\n| --- | --- |\n| a\\|b &lt;i&gt; | 1 |")


def test_a_folded_section_opens_without_a_kernel():
    html = rendering.Section("More", (), ("a",), (("b",),), folded=True).page()
    assert html.startswith("<details><summary>More</summary><table>")
