"""A small byte-level tokenizer with a chat template, written as Hugging Face models ship theirs."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '[' + message['role'] + ']' + message['content'] + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


def write_tokenizer(
    directory: Path, *, chat_template: str | None = CHAT_TEMPLATE, corpus: str = "the quick fox"
) -> None:
    """Byte-level BPE of at most 280 tokens, as Hugging Face models ship it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([corpus], trainer)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"chat_template": chat_template} if chat_template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
