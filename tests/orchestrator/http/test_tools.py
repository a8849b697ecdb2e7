"""Tool calls in the text of an answer, whole and in parts of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.http.bodies import ChatBody
from orchestrator.http.tool_calls import ToolCalls
from orchestrator.http.tools import ToolUse, tool_use
from outrider.errors import InvalidRequest
from outrider.grammar import GrammarCompiler
from outrider.tokenizer import Tokenizer
from tests.chat_templates import LLAMA3, QWEN3
from tests.e2e.byte_tokenizer import EOS, load_byte_tokenizer
from tests.services.tokenizer_files import write_tokenizer

WEATHER: dict[str, Any] = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "$defs": {"city": {"type": "string"}},
    },
}
TIME: dict[str, Any] = {"name": "time"}
FUNCTIONS = {"weather": WEATHER, "time": TIME}
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS.values()]
AUTO = ToolUse("auto", False, FUNCTIONS)
LLAMA = ToolUse("auto", False, FUNCTIONS, is_json=True)
REQUIRED = ToolUse("required", False, FUNCTIONS)


def said(use: ToolUse, text: str, size: int) -> tuple[str, list[tuple[str, str]], bool]:
    """Content, calls and ending of a text that arrives in parts of `size` characters."""
    calls = ToolCalls(use)
    content, found, is_call = "", {}, False
    parts = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    for number, part in enumerate(parts, 1):
        new = calls.push(part, is_end=number == len(parts))
        content += new.content
        is_call |= new.is_call
        for call in new.calls:
            function = call["function"]
            name, arguments = found.get(call["index"], ("", ""))
            name += function.get("name", "")
            found[call["index"]] = (name, arguments + function["arguments"])
    return content, list(found.values()), is_call


def _dumped(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def tag(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {_dumped(arguments)}}}\n</tool_call>'


CASES: dict[str, tuple[ToolUse, str, tuple[str, list[tuple[str, str]], bool]]] = {
    "text": (AUTO, "No <tool> needed <", ("No <tool> needed <", [], False)),
    "one": (AUTO, tag("time"), ("", [("time", "{}")], True)),
    "after text": (AUTO, "Well: " + tag("time"), ("Well: ", [("time", "{}")], True)),
    "two": (
        AUTO,
        tag("time") + "\n" + tag("weather", city="Åre"),
        ("", [("time", "{}"), ("weather", '{"city": "Åre"}')], True),
    ),
    "cut off": (AUTO, "a<tool_call>\n{", ("a<tool_call>\n{", [], False)),
    "cut off after one": (
        AUTO,
        tag("time") + "\n<tool_call>\n{",
        ("<tool_call>\n{", [("time", "{}")], True),
    ),
    "text after one": (AUTO, tag("time") + "\n It is ", ("\n It is ", [("time", "{}")], True)),
    "a tag in arguments": (
        AUTO,
        tag("weather", city="</tool_call>}<tool_call>") * 2,
        ("", [("weather", '{"city": "</tool_call>}<tool_call>"}')] * 2, True),
    ),
    "as written": (
        AUTO,
        '<tool_call>\n{"name": "time", "arguments": {"a":1e999 }}\n</tool_call>',
        ("", [("time", '{"a":1e999 }')], True),
    ),
    "JSON": (
        LLAMA,
        '{"name": "weather", "parameters": {"city":"{x"}}',
        ("", [("weather", '{"city":"{x"}')], True),
    ),
    "text, then JSON": (LLAMA, 'a {"name": "time"}', ('a {"name": "time"}', [], False)),
    "JSON, cut off": (LLAMA, '{"name": "ti', ('{"name": "ti', [], False)),
    "no text": (LLAMA, "", ("", [], False)),
    "required": (
        REQUIRED,
        '[{"name": "time", "parameters": {}}, {"name": "weather", "parameters": {"city": "x"}}]',
        ("", [("time", "{}"), ("weather", '{"city": "x"}')], True),
    ),
    "required, as written": (
        REQUIRED,
        '[ {"name": "time" ,"parameters":{"a":1e999}} , {"name": "time", "parameters": {}} ]',
        ("", [("time", '{"a":1e999}'), ("time", "{}")], True),
    ),
    "required, a call in another order": (
        REQUIRED,
        '[{"name": "time", "parameters": {}}, {"parameters": {}, "name": "time"}]',
        ('[{"name": "time", "parameters": {}}, {"parameters": {}, "name": "time"}]', [], False),
    ),
    "required, no calls": (REQUIRED, "[]", ("[]", [], False)),
    "required, no list": (REQUIRED, '{"a": 1}', ('{"a": 1}', [], False)),
    "required, cut off": (REQUIRED, '[{"name"', ('[{"name"', [], False)),
    "named": (
        ToolUse("weather", True, FUNCTIONS),
        '{"city": "x"}',
        ("", [("weather", '{"city": "x"}')], False),
    ),
}


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_calls_are_the_same_whole_and_in_parts(case: str, size: int) -> None:
    use, text, expected = CASES[case]
    assert said(use, text, size) == expected


def test_formats_of_answers() -> None:
    """Definitions of a function's schema move to the root, where its references point."""
    schema = json.loads(REQUIRED.format().json or "")
    assert schema["$defs"] == {"city": {"type": "string"}}
    assert [one["properties"]["name"]["const"] for one in schema["items"]["anyOf"]] == [*FUNCTIONS]
    one = ToolUse("required", False, FUNCTIONS, is_parallel=False)
    assert json.loads(one.format().json or "")["maxItems"] == 1
    calls = json.loads(AUTO.format().structural_tag or "")["format"]
    assert calls["triggers"] == ["<tool_call>"]
    for tag, name in zip(calls["tags"], FUNCTIONS, strict=True):
        text = tag["begin"] + "{}" + tag["end"]
        assert said(AUTO, text, 1000) == ("", [(name, "{}")], True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"name": "time"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_a_wrong_choice_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    """Also `auto` without a template that writes calls as we read them."""
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "?"}], **fields})
    with pytest.raises(InvalidRequest) as caught:
        tool_use(body, None)
    assert caught.value.field == named


OTHER = "{% for m in messages %}{{ m.content }}<tool_call><function=f></tool_call>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [(QWEN3, AUTO), (LLAMA3, LLAMA), (OTHER, None), ("{{ messages[0].content }}", None)],
)
def test_auto_is_by_the_chat_template(
    template: str, expected: ToolUse | None, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "?"}], "tools": TOOLS})
    tokenizer = Tokenizer.load(str(tmp_path))
    if expected is not None:
        assert tool_use(body, tokenizer) == expected
        return
    with pytest.raises(InvalidRequest, match="auto: the model's chat template"):
        tool_use(body, tokenizer)


def test_an_answer_in_json_is_a_call_or_text(tmp_path: Path) -> None:
    """As Llama 3 writes calls: alone, or not at all."""
    compiler = GrammarCompiler(load_byte_tokenizer(tmp_path), 0, [EOS])
    grammar = compiler.submit(LLAMA.format()).result(60)
    for text, is_allowed in (
        ("", True),
        ("It is {late}.", True),
        ('{"name": "weather", "parameters": {"city": "x"}}', True),
        ('{"name": "time", "parameters": {}}', True),
        ('{"name": "weather", "parameters": {"city": 1}}', False),
        ('{"name": "other", "parameters": {}}', False),
        ('{"name": "time", "parameters": {}} ', False),
    ):
        matcher, ids = grammar.matcher(), list(text.encode())
        done = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert done == is_allowed, text


def test_no_tools() -> None:
    for fields in ({}, {"tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": "none"}):
        body = ChatBody.model_validate({"messages": [{"role": "user", "content": "?"}], **fields})
        assert tool_use(body, None) is None
