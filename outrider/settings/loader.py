"""The one loader of settings: a program's flags, then its environment. The only reader of either.

A field's flag is `--its-name`, its variable `OUTRIDER_<PROGRAM>_ITS_NAME`. An unknown flag, an
unknown variable of the program or a bad value is a ConfigError. Knows no setting but those that
are secrets.
"""

from __future__ import annotations

import argparse
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from outrider import __version__
from outrider.errors import ConfigError
from outrider.security.keys import check_key
from outrider.settings.redis_address import has_password

Config = TypeVar("Config")

_ASKS_CALLERS = re.compile(r"OUTRIDER_(TARGET|DRAFT|ORCHESTRATOR)_((TIER_)?TLS_\w+|API_KEYS_FILE)")


def silence_grpc() -> None:
    """For the command line, whose messages say what gRPC's lines mean; before it is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def api_key_variable() -> str | None:
    """A caller's own key, for the command line; None: it is not set. Raises ConfigError."""
    key = os.environ.get("OUTRIDER_API_KEY")
    return check_key(key, "OUTRIDER_API_KEY") if key else None


def require_plain_programs() -> None:
    """For a command that calls programs it starts itself without TLS and without a key.

    They inherit our environment: raises ConfigError naming a variable that would have them ask.
    """
    for name in sorted(filter(_ASKS_CALLERS.fullmatch, os.environ)):
        raise ConfigError(
            f"{name}: this command calls the services that it starts without TLS and without a "
            "key; unset it"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def load(
    kind: type[Config],
    program: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The program's configuration. Raises ConfigError naming the flag or variable that is wrong."""
    environ = os.environ if environ is None else environ
    prefix = f"OUTRIDER_{program.upper()}_"
    hints = typing.get_type_hints(kind)
    settings = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    parser = _Parser(
        prog=f"python -m {kind.__doc__.split('python -m ')[1].split('`')[0]}"
        if kind.__doc__
        else "",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"outrider {__version__}")
    for name, entry in settings.items():
        _add_flag(parser, entry, hints[name], prefix)
    values = {}
    for name, text in environ.items():
        if name.startswith(prefix):
            setting_name = name.removeprefix(prefix).lower()
            if setting_name not in settings:
                raise ConfigError(f"{name}: no such setting of {program}")
            values[setting_name] = _parse(text, hints[setting_name], name)
    for name, entry in settings.items():
        alias = entry.metadata["env"]
        if alias and alias in environ and name not in values:
            values[name] = _parse(environ[alias], hints[name], alias)
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not MISSING:
            _refuse_secret(name, value)
            values[name] = value if isinstance(value, bool) else _parse(value, hints[name], name)
    return kind(**values)


def _refuse_secret(name: str, value: Any) -> None:
    """Every user of the machine sees its command lines."""
    if name == "redis_url" and has_password(value):
        raise ConfigError(
            "--redis-url: no password on a command line; give the URL in the environment, or "
            "--redis-password-file"
        )


def _add_flag(parser: _Parser, entry: Field[Any], hint: Any, prefix: str) -> None:
    flag = f"--{entry.name.replace('_', '-')}"
    text = f"{entry.metadata['help']} [{prefix}{entry.name.upper()}; default {entry.default!r}]"
    shown: dict[str, Any] = {"help": text.replace("%", "%%"), "default": MISSING}
    if hint is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shown)
    else:
        parser.add_argument(flag, metavar=_type_name(hint).upper(), **shown)


def _base_type(hint: Any) -> tuple[Any, bool]:
    if isinstance(hint, types.UnionType):
        (inner,) = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner, True
    return hint, False


def _type_name(hint: Any) -> str:
    return str(_base_type(hint)[0].__name__)


def _parse(text: str, hint: Any, name: str) -> Any:
    kind, is_optional = _base_type(hint)
    if is_optional and text == "":
        return None
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: {text!r} is not of type {_type_name(hint)}") from None
