"""Structural tags as one Lark grammar of llguidance: text with a format between tags.

The form is xgrammar's, which vLLM takes: `{"type": "structural_tag", "format": {"type": ...}}`, or
the older `{"structures": [...], "triggers": [...]}`. Formats of other types, and fields that would
have no effect, are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

# Between the tokens of JSON: a line break and its indentation. Without a bound, a model may write
# line breaks up to max_tokens.
JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
_TEXT = r"/(?s:.*)/"
_MAX_DEPTH = 32
# The translation of EBNF takes quadratic time: at most about 0.2 s.
_MAX_EBNF_CHARS = 8_192
# Texts of which the first one ends a format. None: the next format follows, so that the format
# must have an end of its own; (): the output ends with it.
Ends = tuple[str, ...] | None


def structural_grammar(spec: Any) -> str:
    """llguidance's source of structural tags. Raises ValueError that names what is wrong."""
    if not isinstance(spec, dict):
        raise ValueError("an object is required")
    if "structures" in spec or "triggers" in spec:
        spec = _from_structures(spec)
    elif spec.get("type") != "structural_tag" or "format" not in spec:
        raise ValueError("type structural_tag with a format, or structures and triggers, required")
    _known(spec, "", "type", "format")
    return _Grammar().source(spec["format"])


def lark_grammar(text: str) -> str:
    """A grammar in Lark; one in EBNF (GBNF) is translated. Raises ValueError."""
    if "::=" not in text or is_lark_syntax(text):
        return text
    if len(text) > _MAX_EBNF_CHARS:
        raise ValueError(f"{len(text)} characters of EBNF; at most {_MAX_EBNF_CHARS}; or use Lark")
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # its own error is only an Exception
        raise ValueError(str(error)) from None


def _from_structures(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The older form as the newer one."""
    _known(spec, "", "type", "structures", "triggers")
    if spec.get("type", "structural_tag") != "structural_tag":
        raise ValueError("type: must be structural_tag")
    tags = []
    for index, part in enumerate(_list(spec, "structures", "")):
        where = f"structures[{index}]"
        _known(part, where, "begin", "schema", "end")
        schema = part.get("schema", {})
        if isinstance(schema, str):
            schema = json.loads(schema)
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": part.get("begin"), "content": content})
        tags[-1]["end"] = part.get("end")
    triggers = _list(spec, "triggers", "")
    return {"format": {"type": "triggered_tags", "triggers": triggers, "tags": tags}}


class _Grammar:
    """Writes the rules of one grammar, which may refer to further grammars by name."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._grammars: list[dict[str, Any]] = []
        self._depth = 0
        self._kinds: dict[str, Callable[[Mapping[str, Any], str, Ends], str]] = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "regex": self._regex,
            "grammar": self._grammar,
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "optional": self._repeated,
            "star": self._repeated,
            "plus": self._repeated,
            "repeat": self._repeated,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }

    def source(self, spec: Any) -> str:
        """The grammar of a whole output."""
        start = self._format(spec, "format", ())
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._lines])
        if not self._grammars:
            return lark
        return json.dumps({"grammars": [{"lark_grammar": lark}, *self._grammars]})

    def _format(self, spec: Any, where: str, ends: Ends) -> str:
        """Name of the rule of a format, and of the first of `ends` after it."""
        if not isinstance(spec, dict):
            raise ValueError(f"{where}: an object is required")
        kind = spec.get("type")
        if kind not in self._kinds:
            known = ", ".join(self._kinds)
            raise ValueError(f"{where}: type {kind!r} is not supported; one of {known}")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"{where}: formats are nested more than {_MAX_DEPTH} deep")
        name = self._rule(self._kinds[kind](spec, where, ends))
        self._depth -= 1
        return name

    def _rule(self, body: str, options: str = "") -> str:
        name = f"rule_{len(self._lines)}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"TERMINAL_{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def _const_string(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        _known(spec, where, "type", "value")
        return _then(_literal(_string(spec, "value", where)), ends)

    def _json_schema(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        _known(spec, where, "type", "json_schema", "style", "any_order")
        if spec.get("style", "json") != "json" or spec.get("any_order", False):
            raise ValueError(f"{where}: only style json and any_order false are supported")
        schema = spec.get("json_schema")
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(f"{where}.json_schema: a JSON schema is required")
        options = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
        return _then(f"%json {json.dumps({**options, **schema})}", ends)

    def _regex(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        _known(spec, where, "type", "pattern")
        source = json.loads(LLMatcher.grammar_from_regex(_string(spec, "pattern", where)))
        regex = source["grammars"][0]["lark_grammar"].removeprefix("start: ")
        return _then(self._terminal(regex), ends)

    def _grammar(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        _known(spec, where, "type", "grammar")
        name = f"grammar_{len(self._grammars)}"
        try:
            lark = lark_grammar(_string(spec, "grammar", where))
        except ValueError as error:
            raise ValueError(f"{where}.grammar: {error}") from None
        self._grammars.append({"name": name, "lark_grammar": lark})
        return _then(f"@{name}", ends)

    def _any_text(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        _known(spec, where, "type", "excludes")
        return self._text_until(spec, where, ends)

    def _text_until(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        """Any text without `excludes`, up to the first of `ends`."""
        if ends is None:
            raise ValueError(f"{where}: {spec['type']} must be last, or last in a tag with an end")
        text = self._without(spec, where)
        if not ends:
            return text
        return self._rule(f"{text} ({_any_of(ends)})", "[lazy]")

    def _without(self, spec: Mapping[str, Any], where: str) -> str:
        """Terminal of the texts that contain none of `excludes`."""
        excluded = _strings(spec, "excludes", where) if spec.get("excludes") else []
        parts = "".join(f" & ~({_TEXT} {_literal(each)} {_TEXT})" for each in excluded)
        return self._terminal(_TEXT + parts)

    def _sequence(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        _known(spec, where, "type", "elements")
        elements = _list(spec, "elements", where)
        last = len(elements) - 1
        return " ".join(
            self._format(each, f"{where}.elements[{i}]", ends if i == last else None)
            for i, each in enumerate(elements)
        )

    def _or(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        _known(spec, where, "type", "elements")
        return " | ".join(
            self._format(each, f"{where}.elements[{i}]", ends)
            for i, each in enumerate(_list(spec, "elements", where))
        )

    def _repeated(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        kind = spec["type"]
        bounds = ("min", "max") if kind == "repeat" else ()
        _known(spec, where, "type", "content", *bounds)
        count = {"optional": "?", "star": "*", "plus": "+"}.get(kind, "")
        if kind == "repeat":
            least: Any = spec.get("min")
            most: Any = spec.get("max")
            are_numbers = type(least) is int and type(most) is int
            if not are_numbers or least < 0 or (most != -1 and most < max(least, 1)):
                why = "min and max must be a range with max 1 or more, or -1: no limit"
                raise ValueError(f"{where}: {why}")
            count = f"{{{least},{'' if most == -1 else most}}}"
        content = self._format(spec.get("content"), f"{where}.content", None)
        return _then(f"({content}){count}", ends)

    def _tag(self, spec: Mapping[str, Any], where: str, ends: Ends, skipped: str = "") -> str:
        """`skipped`: the prefix of `begin` that the trigger has matched."""
        _known(spec, where, "type", "begin", "content", "end")
        begin = _string(spec, "begin", where).removeprefix(skipped)
        end = spec.get("end")
        closing = (
            _strings(spec, "end", where) if isinstance(end, list) else [_string(spec, "end", where)]
        )
        content_ends = tuple(closing) if all(closing) else None
        if not any(closing):
            return (
                f"{_literal(begin)} {self._format(spec.get('content'), f'{where}.content', ends)}"
            )
        content = self._format(spec.get("content"), f"{where}.content", content_ends)
        after = "" if content_ends else f" ({_any_of(closing)})"
        return _then(f"{_literal(begin)} {content}{after}", ends)

    def _triggered_tags(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        """Text up to a trigger, the rest of a tag that begins with it, and again."""
        flags = ("at_least_one", "stop_after_first")
        _known(spec, where, "type", "triggers", "tags", "excludes", *flags)
        triggers = _strings(spec, "triggers", where)
        text, tags, firsts = self._without(spec, where), [], []
        for index, tag in enumerate(_list(spec, "tags", where)):
            place = f"{where}.tags[{index}]"
            begin = _string(tag, "begin", place)
            trigger = next((each for each in triggers if begin.startswith(each)), None)
            if not trigger:
                raise ValueError(f"{place}: no trigger begins {begin!r}")
            opening = self._rule(f"{text} {_literal(trigger)}", "[lazy]")
            tags.append(f"{opening} {self._rule(self._tag(tag, place, None, trigger))}")
            if _flag(spec, "at_least_one", where):
                firsts.append(self._rule(self._tag(tag, place, None)))
        any_tag = self._rule(" | ".join(tags))
        first = f"({' | '.join(firsts)})"
        if _flag(spec, "stop_after_first", where):
            tail = f"{any_tag}{_closing(ends)} | {self._text_until(spec, where, ends)}"
            return _then(first, ends) if firsts else tail
        tail = f"{any_tag}* {self._text_until(spec, where, ends)}"
        return f"{first} {tail}" if firsts else tail

    def _tags_with_separator(self, spec: Mapping[str, Any], where: str, ends: Ends) -> str:
        flags = ("at_least_one", "stop_after_first")
        _known(spec, where, "type", "tags", "separator", *flags)
        tags = self._rule(
            " | ".join(
                self._rule(self._tag(tag, f"{where}.tags[{index}]", None))
                for index, tag in enumerate(_list(spec, "tags", where))
            )
        )
        separator = _literal(_string(spec, "separator", where))
        listed = tags if _flag(spec, "stop_after_first", where) else f"{tags} ({separator} {tags})*"
        return _then(listed if _flag(spec, "at_least_one", where) else f"({listed})?", ends)


def _then(body: str, ends: Ends) -> str:
    return body + _closing(ends)


def _closing(ends: Ends) -> str:
    return f" ({_any_of(ends)})" if ends else ""


def _any_of(texts: Sequence[str]) -> str:
    return " | ".join(map(_literal, texts))


def _literal(text: str) -> str:
    return json.dumps(text)


def _known(spec: Any, where: str, *names: str) -> None:
    """Raises ValueError for other fields, which would have no effect."""
    if not isinstance(spec, dict):
        raise ValueError(f"{where}: an object is required")
    for name in spec:
        if name not in names:
            raise ValueError(f"{where}.{name}".lstrip(".") + ": is not supported")


def _flag(spec: Mapping[str, Any], name: str, where: str) -> bool:
    value = spec.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}.{name}: must be true or false")
    return value


def _string(spec: Any, name: str, where: str) -> str:
    value = spec.get(name) if isinstance(spec, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}.{name}: a text is required")
    return value


def _list(spec: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = spec.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}.{name}".lstrip(".") + ": a list is required")
    return value


def _strings(spec: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = _list(spec, name, where)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}.{name}: a list of texts is required")
    return values
