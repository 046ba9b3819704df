"""Terms of the field have their meaning as a tooltip, where they stand first."""

import re

from bizassist_nb.core.terms import TERMS, explain


def test_a_term_is_explained_where_it_stands_first():
    page = explain("<p>held-out loss 2.1 nats</p><p>loss 2.0 nats</p>")
    assert re.findall(r"<abbr [^>]*>([^<]*)</abbr>", page) == ["held-out", "loss", "nats"]
    assert f'<abbr title="{TERMS["nats"]}">nats</abbr></p>' in page


def test_what_is_no_prose_stays_as_it_is():
    for page in (
        "<svg><text>loss</text></svg>",
        '<p title="loss > 2">1</p>',
        "<pre>loss</pre>",
        "<details><summary>loss</summary>base</details>",
        "<b>my-loss base_1 losses</b>",
        '<abbr title="x">loss</abbr>',
    ):
        assert explain(page) == page
