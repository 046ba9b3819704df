"""Answers that a model may give by mistake or because its data told it to: nothing in them may run or be fetched."""

import msgspec
from random_run import environment

from bizassist_nb.api import Run
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.ballot import append
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.records import Vote

_RUN = "window.hacked=(window.hacked||0)+1"
_AWAY = "http://evil.invalid/x"

HOSTILE = [
    f"<script>{_RUN}</script>",
    f"<SCRIPT SRC={_AWAY}.js></SCRIPT>",
    f"<scr<script>ipt>{_RUN}</scr</script>ipt>",
    f'<img src=x onerror="{_RUN}">',
    f"<img src={_AWAY}>",
    f"![a picture]({_AWAY}.png)",
    f'![x](x" onerror="{_RUN})',
    f"![x][1]\n\n[1]: {_AWAY}.png",
    f"<svg onload='{_RUN}'></svg>",
    f"<svg><script>{_RUN}</script></svg>",
    f"<svg><animate onbegin={_RUN} attributeName=x dur=1s></svg>",
    f"<svg><use href='data:image/svg+xml,<svg id=x onload={_RUN}>#x'/></svg>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={_RUN}>",
    f"<iframe srcdoc='<script>parent.{_RUN}</script>'></iframe>",
    f"<iframe src=javascript:{_RUN}></iframe>",
    f"<object data=javascript:{_RUN}></object><embed src=javascript:{_RUN}>",
    f"<details open ontoggle={_RUN}>more</details>",
    f"<body onload={_RUN}><input autofocus onfocus={_RUN}>",
    f"<video><source onerror={_RUN}></video><audio src=x onerror={_RUN}>",
    f"<a href=javascript:{_RUN}>click me</a>",
    f"[click me](javascript:{_RUN})",
    f"[click me](JaVaScRiPt:{_RUN})",
    f"[click me](java&#x09;script:{_RUN})",
    f"[click me](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg== '{_RUN}')",
    f"[click me](vbscript:{_RUN})",
    f"<style>@import '{_AWAY}.css'; .bizassist {{ display: none }} body {{ background: url({_AWAY}) }}</style>",
    f"<link rel=stylesheet href={_AWAY}.css><meta http-equiv=refresh content='0;url={_AWAY}'>",
    f"<form action={_AWAY}><button formaction=javascript:{_RUN}>send</button></form>",
    f"<div style='position:fixed;inset:0;background:red' onmouseover={_RUN}>all over</div>",
    f"</div></div></div></textarea></pre><!-- {_RUN} --> --!><plaintext>",
    f"```html\n<script>{_RUN}</script>\n",
    f"`{'`' * 40}<script>{_RUN}</script>",
    "| a | b |\n|---|\n| <b onclick=x>1 | 2 | 3 |\n" + "|" * 500,
    "[" * 3000 + "](" * 300,
    "> " * 200 + "deep",
    "* " * 200 + "deep",
    "\u202e\u2066 right to left over\u2069 everything \u202e",
    "a\0b\0<scr\0ipt>" + _RUN + "</scr\0ipt>",
    "\ud83d half a character \ufffe \x1b[31m red \x07",
    "Z" + "\u0300" * 2000 + "algo",
    "word " * 20_000,
    "x" * 100_000,
    "From $49 to $99 \\href{https://example.com}{x} $$\\href{https://example.com}{x}$$ \\(\\href{https://example.com}{x}\\)",
    "$\\href{javascript:" + _RUN + "}{x}$ and \\(\\unicode{x}\\) {{constructor.constructor('" + _RUN + "')()}}",
]


def hostile_run(folder, text):
    """A run of files alone, in which every text is this one."""
    folder.mkdir(parents=True)
    clean = text.encode("utf-8", "replace").decode().replace("\0", "") or "x"
    asked = Settings(data=clean, model=clean, system_prompt=clean, columns={"context": clean})
    (folder / "settings.toml").write_text(asked.to_toml(), "utf-8")
    versions = {"versions": {clean: clean}, "device": clean, "python": clean, "data": clean}
    write_json(folder / "environment.json", msgspec.structs.replace(environment(clean, clean), **versions))
    journal = Journal(folder)
    lengths = {"rows": 2, "tokens": 9, "trained_tokens": 5, "median": 4, "longest": 5, "truncated": 1}
    for kind in (records.Model, records.Engine):
        journal.write(kind(name=text, reason=text))
    journal.write(records.Data(source=text, training=lengths, held_out=lengths, rejected=1,
        rejected_rows=[{"number": 3, "reason": text}],
        shown={"number": 1, "runs": [[text, False], [text, True]]},
    ))  # fmt: skip
    journal.write(records.Preflight(sentence=text))
    journal.write(records.Fit(step=0, micro_batch=1, checkpointing=False, precision=text, reason=text))
    journal.write(records.Unscored(step=2, reason=text))
    journal.write(records.Plan(steps=2))
    for step in (1, 2):
        journal.write(records.Step(step=step, loss=1.0, learning_rate=0.1, gradient_norm=None, tokens=1, seconds=1.0))
    journal.write(records.Evaluation(step=2, loss=1.0))
    journal.write(records.Unanswered(reason=text))
    journal.write(records.Error(message=text, expected=False))
    journal.write(records.State(state="failed"))
    (folder / "worker.log").write_bytes(text.replace("\n", " ").encode("utf-8", "replace") * 3)
    scores = [[Score(i, n + i, 3, (text, "b")[i % 2]) for i in range(4)] for n in (9, 6)]
    found = judge(*scores, seed=0, questions=dict.fromkeys(range(4), text))
    answer = {"text": text, "stopped": True, "signs": ["loops"]}
    write_json(folder / "answers.json", [{"prompt": text, "base": answer, "tuned": answer}])
    write_json(
        folder / "evaluation.json", msgspec.structs.replace(assess(found, found, None), sentence=text, notes=[text])
    )
    append(Run(folder), Vote(time=1.0, question=text, base=text, tuned=text, winner="tuned", left="base"))
    return Run(folder)
