"""Structural tags: which texts each type of format allows, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outrider.errors import InvalidRequest
from outrider.grammar import GrammarCompiler
from outrider.sampling.structured_outputs import StructuredOutputs
from tests.e2e.byte_tokenizer import EOS, load_byte_tokenizer

INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
BOOLEAN = {"type": "json_schema", "json_schema": {"type": "boolean"}}
ANY = {"type": "any_text"}


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def tag(begin: Any, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def many(kind: str, *elements: Any) -> dict[str, Any]:
    return {"type": kind, "elements": elements}


def repeated(kind: str, content: Any, **bounds: int) -> dict[str, Any]:
    return {"type": kind, "content": content, **bounds}


TAG_A, TAG_B = tag("<f=a>", INTEGER, "</f>"), tag("<f=b>", BOOLEAN, "</f>")


def triggered(**fields: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": ["<f="], "tags": [TAG_A, TAG_B], **fields}


def separated(**fields: Any) -> dict[str, Any]:
    return {"type": "tags_with_separator", "tags": [TAG_A, TAG_B], "separator": ",", **fields}


# Format, texts that it allows, texts that it does not.
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "const_string": (const('é\n"😀/'), ['é\n"😀/'], ["", "é"]),
    "json_schema": (INTEGER, ["3"], ["x", "{}"]),
    "any JSON": ({"type": "json_schema", "json_schema": True}, ["3", "{}"], ["x"]),
    "regex": ({"type": "regex", "pattern": "a/b+"}, ["a/bb"], ["a"]),
    "EBNF": ({"type": "grammar", "grammar": 'root ::= "yes" | "no"'}, ["yes", "no"], ["x"]),
    "Lark": ({"type": "grammar", "grammar": "start: /[ab]+/"}, ["ab"], ["x"]),
    "any_text": (ANY, ["", "any\n"], []),
    "excludes": ({**ANY, "excludes": ["bad", "é"]}, ["", "ba d"], ["a bad x", "é"]),
    "sequence": (
        many("sequence", const("A: "), BOOLEAN, ANY), ["A: true", "A: false x"], ["A:", "true"],
    ),
    "or": (many("or", const("yes"), const("yesno"), INTEGER), ["yes", "yesno", "3"], ["no"]),
    "repetitions": (
        many(
            "sequence", repeated("optional", const("a")), repeated("plus", const("b")),
            repeated("star", const("c")), repeated("repeat", const("d"), min=1, max=2),
            repeated("repeat", const("e"), min=0, max=-1),
        ),
        ["bd", "abbccddeee"],
        ["ad", "abddd", "bd f"],
    ),
    "tag": (
        tag("<r>", INTEGER, ["</r>", "</a>"]), ["<r>1</r>", "<r>1</a>"], ["<r>1", "<r>1</a></r>"],
    ),
    "text in a tag": (
        tag("<think>", ANY, "</think>"), ["<think>x</think>", "<think></think>"],
        ["<think>", "<think></think>x"],
    ),
    "no end": (tag("<r>", INTEGER, ""), ["<r>1"], ["<r>"]),
    "triggered_tags": (
        triggered(), ["", "x<f", "hi <f=a>1</f> and <f=b>true</f>x"],
        ["<f=c>", "<f=a>x</f>", "a<f=a>1", "<f=a>1</f><f="],
    ),
    "at_least_one": (
        triggered(at_least_one=True), ["<f=a>1</f>", "<f=a>1</f> x <f=b>true</f>"],
        ["", "x<f=a>1</f>"],
    ),
    "stop_after_first": (
        triggered(stop_after_first=True), ["", "text", "x<f=a>1</f>"], ["<f=a>1</f> x"],
    ),
    "exactly one": (
        triggered(at_least_one=True, stop_after_first=True), ["<f=a>1</f>"],
        ["", "x", "<f=a>1</f> x"],
    ),
    "excludes of tags": (triggered(excludes=["zz"]), ["z<f=a>1</f>z"], ["zz", "<f=a>1</f>zz"]),
    "tags in a tag": (
        tag("<r>", triggered(), "</r>"), ["<r></r>", "<r>a<f=a>1</f>b</r>"],
        ["<r>a<f=a>1</f>b", "<r></r>x"],
    ),
    "thoughts, then tags": (
        many("sequence", tag("<think>", ANY, "</think>"), triggered()),
        ["<think>hm</think>", "<think>hm<f=a></think>text<f=a>1</f> more <f=b>true</f>"],
        ["<f=a>1</f>", "<think></think><f=a>x</f>"],
    ),
    "tags_with_separator": (
        separated(), ["", "<f=a>1</f>", "<f=a>1</f>,<f=b>true</f>,<f=a>2</f>"],
        ["<f=a>1</f>,", "x"],
    ),
    "at least one of a list": (separated(at_least_one=True), ["<f=a>1</f>"], [""]),
    "one of a list": (
        separated(stop_after_first=True), ["", "<f=a>1</f>"], ["<f=a>1</f>,<f=a>1</f>"],
    ),
}  # fmt: skip
OLDER = {
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": '{"type": "boolean"}', "end": "</f>"},
    ],
    "triggers": ["<f="],
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    return GrammarCompiler(load_byte_tokenizer(tmp_path_factory.mktemp("bytes")), 0, [EOS])


def allows(compiler: GrammarCompiler, told: Any, text: str) -> bool:
    structured = StructuredOutputs(structural_tag=json.dumps(told))
    matcher, ids = compiler.submit(structured).result(60).matcher(), list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("case", CASES)
def test_texts_that_a_format_allows(case: str, compiler: GrammarCompiler) -> None:
    form, allowed, forbidden = CASES[case]
    told = {"type": "structural_tag", "format": form}
    assert [text for text in allowed if not allows(compiler, told, text)] == []
    assert [text for text in forbidden if allows(compiler, told, text)] == []


def test_the_older_form_is_triggered_tags(compiler: GrammarCompiler) -> None:
    _, allowed, forbidden = CASES["triggered_tags"]
    assert all(allows(compiler, OLDER, text) for text in allowed)
    assert not any(allows(compiler, OLDER, text) for text in forbidden)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"type": "token", "token": 3}, "format: type 'token' is not supported; one of const_str"),
        ("x", "format: an object"),
        ({"type": "json_schema", "json_schema": 3}, "format.json_schema"),
        ({**INTEGER, "style": "qwen_xml"}, "only style json"),
        ({**ANY, "max_tokens": 3}, "format.max_tokens: is not supported"),
        (many("sequence"), "format.elements: a list"),
        (many("sequence", ANY, const("x")), r"format.elements\[0\]: any_text must be last"),
        (repeated("star", ANY), "format.content: any_text must be last"),
        (repeated("repeat", ANY, min=2, max=1), "min and max must be a range"),
        (repeated("repeat", ANY, min=0, max=0), "min and max must be a range"),
        (repeated("repeat", ANY, min=True, max=2), "min and max must be a range"),
        (triggered(at_least_one="false"), "format.at_least_one: must be true or false"),
        (tag({"type": "token", "token": 1}, ANY, "x"), "format.begin: a text"),
        (triggered(triggers=["<g"]), r"format.tags\[0\]: no trigger begins '<f=a>'"),
        ({"type": "grammar", "grammar": "root ::= ("}, "format.grammar: Expected"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
    form: Any, named: str, compiler: GrammarCompiler
) -> None:
    tags = {"type": "structural_tag", "format": form}
    with pytest.raises(InvalidRequest, match=named) as caught:
        allows(compiler, tags, "")
    assert caught.value.field == "sampling.structured_outputs.structural_tag"


@pytest.mark.parametrize(
    "told", [[], {}, {"type": "structural_tag"}, {**OLDER, "more": 1}, {**OLDER, "type": "x"}]
)
def test_other_forms_are_refused(told: Any, compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match="is malformed"):
        allows(compiler, told, "")
