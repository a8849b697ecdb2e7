"""Tokenizer compared with transformers, on a byte-level BPE trained here; no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from outrider.errors import ConfigError, InvalidRequest
from outrider.tokenizer import Tokenizer

_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
{{ '<|' + message['role'] + '|>' }}
{{ message['content'] | trim }}{{ eos_token }}
{%- endfor %}
{% if tools is not none and tools is defined %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

_CORPUS = ["def main():\n    return 1\n", "the quick brown fox", "Grüße, 世界!"] * 5

_CONVERSATIONS = [
    [{"role": "user", "content": "the quick fox"}],
    [
        {"role": "system", "content": "be  brief "},
        {"role": "user", "content": "Grüße\n<s> & 'more'"},
        {"role": "assistant", "content": "def main()"},
        {"role": "user", "content": "世界?"},
    ],
]


def _write(directory: Path, *, vocab_size: int = 300, **settings: Any) -> Path:
    """Writes a tokenizer's files; `settings` go to tokenizer_config.json."""
    directory.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False}
        | {"rstrip": False, "normalized": False, "single_word": False, "special": True},
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)


def _load(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("tokenizer"), chat_template=_CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return _load(directory)


@given(text=st.text(max_size=40))
@settings(deadline=None)
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    """Any text without special tokens is decoded as it was encoded."""
    text = text.replace("<s>", "").replace("</s>", "")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_it_encodes_like_transformers(tokenizer: Tokenizer, directory: Path) -> None:
    """The same ids with and without special tokens, the same text without them."""
    reference = AutoTokenizer.from_pretrained(str(directory))
    for text in (*_CORPUS[:3], "", " leading", "<s>inside</s>"):
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special)
            assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(reference)


def test_special_and_unknown_ids_give_no_text(tokenizer: Tokenizer) -> None:
    """Padded vocabularies have ids without a token."""
    ids = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.decode([0, *ids, tokenizer.vocab_size + 5, 1]) == "fox"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("messages", _CONVERSATIONS)
def test_chats_are_rendered_like_transformers(
    tokenizer: Tokenizer, directory: Path, messages: list[dict[str, str]]
) -> None:
    """Whitespace control, filters, loop controls and special tokens of the template agree."""
    assert chat_ids(tokenizer, messages) == _reference_chat(directory, messages)


def _reference_chat(directory: Path, messages: list[dict[str, str]]) -> list[int]:
    reference = AutoTokenizer.from_pretrained(str(directory))
    rendered = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    return list(rendered["input_ids"] if hasattr(rendered, "keys") else rendered)


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools is not none %}tools{% endif %}fox",
        "{% if documents is none %}fox{% endif %}",
        "{{ strftime_now('%Y') }}",
        "{% if pad_token is defined %}{{ 'pad' }}{% endif %}fox",
        "{% generation %}fox{% endgeneration %}",
    ],
)
def test_templates_have_the_variables_of_transformers(tmp_path: Path, template: str) -> None:
    """`tools` and `documents` are None, `strftime_now` exists, absent tokens are undefined."""
    directory = _write(tmp_path / "t", chat_template=template)
    expected = _reference_chat(directory, _CONVERSATIONS[0])
    assert chat_ids(_load(directory), _CONVERSATIONS[0]) == expected


def test_an_error_inside_the_template_is_an_invalid_request(tmp_path: Path) -> None:
    """Also a Python error, here the sum of a text and a number."""
    tokenizer = _load(_write(tmp_path / "t", chat_template="{{ messages[0]['content'] + 1 }}"))
    with pytest.raises(InvalidRequest):
        chat_ids(tokenizer, _CONVERSATIONS[0])


def test_a_template_file_takes_precedence(tmp_path: Path) -> None:
    """`chat_template.jinja`, which newer models have."""
    directory = _write(tmp_path / "t", chat_template="old")
    (directory / "chat_template.jinja").write_text("new{{ messages[0]['content'] }}", "utf-8")
    messages = [{"role": "user", "content": "fox"}]
    tokenizer = _load(directory)
    assert tokenizer.decode(chat_ids(tokenizer, messages)) == "newfox"
    assert chat_ids(tokenizer, messages) == _reference_chat(directory, messages)


def test_the_default_of_several_named_templates(tmp_path: Path) -> None:
    """A list of templates in tokenizer_config.json: the one named default."""
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain{{ messages[0]['content'] }}"},
    ]
    tokenizer = _load(_write(tmp_path / "t", chat_template=named))
    assert tokenizer.decode(chat_ids(tokenizer, [{"role": "user", "content": "!"}])) == "plain!"


def test_without_a_template_chats_are_refused(tmp_path: Path) -> None:
    """InvalidRequest that names the field; text still works."""
    tokenizer = _load(_write(tmp_path / "t"))
    with pytest.raises(InvalidRequest) as caught:
        chat_ids(tokenizer, _CONVERSATIONS[0])
    assert caught.value.field == "chat"
    assert tokenizer.encode("fox")


def test_messages_that_the_template_rejects(tokenizer: Tokenizer) -> None:
    """`raise_exception` of the template gives InvalidRequest with its message."""
    with pytest.raises(InvalidRequest, match="no such role: robot") as caught:
        chat_ids(tokenizer, [{"role": "robot", "content": "beep"}])
    assert caught.value.field == "chat"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{not json"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{not json"),
        ("chat_template.jinja", "{% for %}"),
    ],
)
def test_a_broken_file_is_a_config_error(tmp_path: Path, name: str, text: str) -> None:
    """ConfigError at loading, not at the first request."""
    directory = _write(tmp_path / "t")
    (directory / name).write_text(text, "utf-8")
    with pytest.raises(ConfigError):
        Tokenizer.load(str(directory))


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer_config.json", b"[]"), ("chat_template.jinja", b"\xff\xfe")]
)
def test_a_file_of_another_format_is_a_config_error(
    tmp_path: Path, name: str, content: bytes
) -> None:
    """JSON that is not an object; a template that is not UTF-8."""
    directory = _write(tmp_path / "t")
    (directory / name).write_bytes(content)
    with pytest.raises(ConfigError):
        Tokenizer.load(str(directory))


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    """None: requests to such a model use token ids."""
    assert Tokenizer.load(str(tmp_path)) is None


def test_a_tokenizer_without_settings(tmp_path: Path) -> None:
    """tokenizer_config.json is optional."""
    directory = _write(tmp_path / "t")
    (directory / "tokenizer_config.json").unlink()
    tokenizer = _load(directory)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


def test_fingerprints_depend_on_the_vocabulary_alone(tmp_path: Path, directory: Path) -> None:
    """Equal for copies with other templates, different for other vocabularies."""
    first = _load(directory).fingerprint
    assert _load(_write(tmp_path / "copy")).fingerprint == first
    assert _load(_write(tmp_path / "other", vocab_size=290)).fingerprint != first


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    """Files saved after training may truncate; prompts must not be truncated."""
    directory = _write(tmp_path / "t")
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = _load(directory)
    text = "the quick brown fox " * 5
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("fox")) < 10
