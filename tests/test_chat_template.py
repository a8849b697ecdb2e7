"""Chat templates render as transformers' apply_chat_template does."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from outrider.chat_template import ChatTemplate
from outrider.errors import ConfigError, InvalidRequest
from outrider.tokenizer import Tokenizer
from tests import vocabularies
from tests.chat_templates import CLOCK, CONVERSATIONS, PARTS_ONLY, TEMPLATES, WEATHER, call

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
KWARGS: dict[str, dict[str, Any]] = {
    "none": {},
    "no thinking": {"enable_thinking": False},
    "date": {"date_string": "1 Jan 2030", "tools_in_user_message": False, "bos_token": "<B>"},
    "style": {"style": {"a": [1, None, 2.5, True]}},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("model")
    vocabularies.save(vocabularies.byte_fallback(), directory, **SPECIAL)
    return AutoTokenizer.from_pretrained(str(directory))


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arguments of tool calls as objects, as transformers wants them."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for made in message.get("tool_calls", ()):
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
    return messages


@functools.cache
def compiled(template: str) -> ChatTemplate:
    return ChatTemplate(template, SPECIAL)


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """Our text; None: refused."""
    try:
        return compiled(template).render(messages, **options)
    except InvalidRequest:
        return None


def of_transformers(
    reference: Any, template: str, messages: list[dict[str, Any]], **options: Any
) -> str | None:
    try:
        return str(
            reference.apply_chat_template(
                with_objects(messages), chat_template=template, tokenize=False, **options
            )
        )
    except Exception:  # of the template, or of transformers' checks
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_does(name: str, reference: Any) -> None:
    """Every template with every conversation, tools or none, template variables, and both ends."""
    num_rendered, template = 0, TEMPLATES[name]
    cases = itertools.product(
        CONVERSATIONS.values(), ([], [WEATHER, CLOCK]), KWARGS.values(), (True, False)
    )
    for messages, tools, kwargs, adds in cases:
        expected = of_transformers(
            reference, template, messages, tools=tools or None, add_generation_prompt=adds, **kwargs
        )
        given = copy.deepcopy(messages)
        text = rendered(template, given, tools=tools, kwargs=kwargs, add_generation_prompt=adds)
        assert text == expected, (messages, tools, kwargs, adds)
        assert given == messages  # rendering changes nothing
        num_rendered += text is not None
    assert num_rendered >= 48


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_message_is_continued_as_transformers_does(name: str, reference: Any) -> None:
    """The text ends with the last message, stripped where the template strips it."""
    num_rendered, options = 0, {"continue_final_message": True, "add_generation_prompt": False}
    for messages in CONVERSATIONS.values():
        if not messages[-1]["content"]:
            continue
        expected = of_transformers(reference, TEMPLATES[name], messages, **options)
        assert rendered(TEMPLATES[name], messages, **options) == expected
        num_rendered += expected is not None
    assert num_rendered >= 4


def test_a_message_that_the_template_rewrites_cannot_be_continued() -> None:
    template = "{% for m in messages %}{{ m['content'].split('END')[0] }}{% endfor %}"
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(template, {}).render(
            [{"role": "user", "content": "oneENDtwo"}], continue_final_message=True
        )
    assert caught.value.field == "chat.continue_final_message"


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]


def test_parts_are_joined_for_templates_that_take_texts_only() -> None:
    """As in vLLM; a template that iterates over parts gets them as they are."""
    for name in ("llama3", "mistral", "gemma", "training"):
        parts = rendered(TEMPLATES[name], [{"role": "user", "content": PARTS}])
        assert parts == rendered(TEMPLATES[name], [{"role": "user", "content": "one\ntwo "}])
        assert parts is not None


@pytest.mark.parametrize("template", [TEMPLATES["gemma3"], PARTS_ONLY])
@pytest.mark.parametrize("continues", [False, True])
def test_parts_are_rendered_as_transformers_does(
    template: str, continues: bool, reference: Any
) -> None:
    """By a template that iterates over them. It may be the only form that it takes."""
    messages = [{"role": "user", "content": PARTS}]
    options = {"add_generation_prompt": not continues, "continue_final_message": continues}
    assert rendered(template, messages, **options) == of_transformers(
        reference, template, messages, **options
    )
    as_text = rendered(PARTS_ONLY, [{"role": "user", "content": "one"}])
    assert as_text == rendered(PARTS_ONLY, [{"role": "user", "content": PARTS[:1]}])


def test_a_template_cannot_reach_the_interpreter(reference: Any) -> None:
    """The sandbox is transformers'."""
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__class__ }}{{ dict.mro() }}",
    ):
        assert not rendered(template, [{"role": "user", "content": "hi"}])
        assert not of_transformers(reference, template, [{"role": "user", "content": "hi"}])


def test_arguments_that_are_not_json_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(TEMPLATES["qwen3"], SPECIAL).render(
            [{"role": "assistant", "content": "", "tool_calls": [call("f", "{")]}]
        )
    assert caught.value.field == "chat.messages.tool_calls"


def _directory(path: Path, **settings: Any) -> Path:
    path.mkdir()
    vocabularies.save(vocabularies.byte_fallback(), path, **SPECIAL, **settings)
    return path


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    """Named templates in the configuration, or a file of transformers 5; as transformers does."""
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    listed = _directory(tmp_path / "listed", chat_template=named)
    in_file = _directory(tmp_path / "file")
    (in_file / "additional_chat_templates").mkdir()
    (in_file / "chat_template.jinja").write_text("d")
    (in_file / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    for directory in (listed, in_file):
        tokenizer = Tokenizer.load(str(directory))
        assert tokenizer is not None
        reference = AutoTokenizer.from_pretrained(str(directory))
        messages = [{"role": "user", "content": "hi"}]
        for tools in ([], [CLOCK]):
            expected = reference.apply_chat_template(messages, tools=tools or None, tokenize=False)
            assert tokenizer.render_chat(messages, tools=tools) == expected


def test_a_file_replaces_the_model_s_template(tmp_path: Path) -> None:
    """`--chat-template`. A file that cannot be read or compiled is an error that names it."""
    directory = str(_directory(tmp_path / "model", chat_template="old"))
    (tmp_path / "own.jinja").write_text("new {{ messages[0].content }}", "utf-8")
    tokenizer = Tokenizer.load(directory, str(tmp_path / "own.jinja"))
    assert tokenizer is not None
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "new hi"
    (tmp_path / "bad.jinja").write_text("{% if %}", "utf-8")
    for name in ("none.jinja", "bad.jinja"):
        with pytest.raises(ConfigError, match="chat"):
            Tokenizer.load(directory, str(tmp_path / name))
