"""Options of a command as one dataclass, and parsers of option values.

Each field is a flag: `Annotated[its type, typer.Option(help=…)] = its default`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from outrider.errors import ConfigError

Options = TypeVar("Options")
Number = TypeVar("Number", int, float)

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def takes(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorator: turns a function of a dataclass into a function of its fields, for typer."""

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            run(kind(**values))

        hints = typing.get_type_hints(kind, include_extras=True)
        fields: list[dataclasses.Field[Any]] = list(dataclasses.fields(kind))  # type: ignore[arg-type]
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=(
                    inspect.Parameter.empty
                    if field.default is dataclasses.MISSING
                    else field.default
                ),
                annotation=hints[field.name],
            )
            for field in fields
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__ = run.__doc__
        command.__name__ = run.__name__
        return command

    return decorate


def parse_count(text: str, flag: str) -> int:
    """Parses 300M, 1.2B or 300_000_000. Raises ConfigError naming the flag."""
    number, unit = (text[:-1], _UNITS[text[-1].upper()]) if _has_unit(text) else (text, 1)
    try:
        count = float(number.replace("_", "")) * unit
        if count >= 0 and count == int(count):
            return int(count)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{flag}: {text!r} is not a number such as 300M or 300_000_000")


def _has_unit(text: str) -> bool:
    return text[-1:].upper() in _UNITS and text[-1:] != ""


def parse_cpus(text: str, flag: str) -> frozenset[int]:
    """Parses CPU numbers as taskset does: 0, 0,2 or 0-3,6. Raises ConfigError naming the flag."""
    cpus: set[int] = set()
    num_cpus = os.cpu_count() or 1
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            span = range(0)
        if not span:
            raise ConfigError(f"{flag}: {text!r} is not a list of CPUs such as 0 or 0-3,6")
        if span[0] < 0 or span[-1] >= num_cpus:
            raise ConfigError(f"{flag}: {text!r}: this machine has CPUs 0 to {num_cpus - 1}")
        cpus.update(span)
    return frozenset(cpus)


def parse_list(text: str, flag: str, kind: Callable[[str], Number]) -> list[Number]:
    """Parses non-negative numbers such as 1,2,4. Raises ConfigError naming the flag."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"{flag}: {text!r} is not a list of numbers such as 1,2,4")
    return numbers


def parse_ids(text: str, flag: str) -> list[int]:
    """Parses token ids such as 1,2,3. Raises ConfigError naming the flag."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a list of token ids such as 1,2,3") from None
