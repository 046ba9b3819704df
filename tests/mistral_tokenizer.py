"""Mistral-7B-Instruct-v0.3's tokenizer as a transformers folder, without the hub."""

import json
from pathlib import Path

import mistral_common
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

MODEL = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"

# As in v0.3's own template, the system message is written into the last question, and only while that has no answer.
TEMPLATE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}\
{% set messages = messages[1:] %}{% endif %}{% for message in messages %}\
{% if message['role'] == 'user' %}[INST] {% if system is defined and loop.last %}\
{{ system + '\\n\\n' }}{% endif %}{{ message['content'] }}[/INST]\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""


def build(folder: Path) -> Path:
    """Convert, with merges in the order of SentencePiece's scores, as the tokenizer.json on the hub has them.

    transformers 5.17 orders them by id instead when it converts the .model file itself, which merges runs of
    spaces too early ("a  b" becomes ▁a ▁▁ b, where Mistral's own tokenizer gives ▁a ▁ ▁b).
    """
    (folder / "tokenizer.model").write_bytes(MODEL.read_bytes())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special})
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = SentencePieceProcessor(model_file=str(MODEL))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].sort(key=lambda pair: -scores.get_score(scores.piece_to_id("".join(pair))))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    (folder / "tokenizer.model").unlink()
    return folder
