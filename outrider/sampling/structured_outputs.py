"""Structured output: the format that a generation's text must have, with vLLM's names.

Plain values and the checks that need no grammar library. `outrider.grammar` compiles them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from outrider.errors import InvalidRequest

FIELD = "sampling.structured_outputs"
# Characters of a schema, expression, grammar, tag, or of all choices together.
MAX_FORMAT_CHARS = 262_144
MAX_CHOICES = 4_096


@dataclass(frozen=True)
class StructuredOutputs:
    """Format of the output; exactly one field is set. Hashable, so that it can be a cache's key.

    `json`: a JSON schema as JSON text. `grammar`: llguidance's variant of Lark, or EBNF.
    `structural_tag`: JSON text; its forms are in `outrider.structural_tags`.
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    structural_tag: str | None = None

    @property
    def kind(self) -> str:
        """Name of the field that is set. Raises InvalidRequest unless it is exactly one."""
        kinds = [entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default]
        if len(kinds) != 1:
            names = ", ".join(entry.name for entry in fields(self))
            given = " and ".join(kinds) or "none"
            raise InvalidRequest(FIELD, f"exactly one of {names} is required, not {given}")
        return kinds[0]

    @property
    def field(self) -> str:
        """Path of the field that is set, for errors."""
        return f"{FIELD}.{self.kind}"

    def validate(self) -> None:
        """Raises InvalidRequest unless exactly one field is set, within its size limits."""
        field = self.field
        if len(self.choice) > MAX_CHOICES:
            raise InvalidRequest(field, f"{len(self.choice)} entries; at most {MAX_CHOICES}")
        texts = self.choice or (self.json, self.regex, self.grammar, self.structural_tag)
        size = sum(len(text) for text in texts if text)
        if size > MAX_FORMAT_CHARS:
            raise InvalidRequest(field, f"{size} characters; at most {MAX_FORMAT_CHARS}")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> StructuredOutputs:
        """The format from an object with the same fields. Raises ValueError."""
        values = {entry.name: stored.get(entry.name, entry.default) for entry in fields(cls)}
        values["choice"] = tuple(values["choice"])
        texts = [values.pop(name) for name in ("json", "regex", "grammar", "structural_tag")]
        is_right = all(text is None or type(text) is str for text in texts)
        if not (is_right and type(values["json_object"]) is bool) or not all(
            type(text) is str for text in values["choice"]
        ):
            raise ValueError("structured_outputs is malformed")
        return cls(texts[0], values["json_object"], texts[1], values["choice"], texts[2], texts[3])
