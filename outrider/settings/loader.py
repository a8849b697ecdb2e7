"""Settings loader: reads a program's settings from its flags and environment variables.

The only module that reads either. A field's flag is `--its-name`, its variable
`OUTRIDER_<PROGRAM>_ITS_NAME`; a flag beats a variable. An unknown flag, an unknown variable of the
program or a bad value raises ConfigError. A renamed setting still has its former flag and variable.
docs/adr/0021-settings-loader.md compares it with pydantic-settings.
"""

from __future__ import annotations

import argparse
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from outrider import __version__
from outrider.errors import ConfigError
from outrider.settings.redis_address import has_password

Config = TypeVar("Config")
# Called with the former name of a setting, as it was given, and its present name.
OnRenamed = Callable[[str, str], None]

_REQUIRE_TLS_OR_KEYS = re.compile(
    r"OUTRIDER_(TARGET|DRAFT|ORCHESTRATOR)_((TIER_)?TLS_\w+|API_KEYS_FILE)"
)


def silence_grpc() -> None:
    """Turns off gRPC's own log lines; call it before gRPC is imported.

    For the command line, whose error messages say the same in plain words.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def api_key_variable() -> str | None:
    """The client's API key in OUTRIDER_API_KEY; None if it is not set. Raises ConfigError."""
    from outrider.security.keys import check_key  # it imports structlog, which --help does not need

    key = os.environ.get("OUTRIDER_API_KEY")
    return check_key(key, "OUTRIDER_API_KEY") if key else None


def require_plain_programs() -> None:
    """Raises ConfigError naming a variable that makes started services require TLS or API keys.

    For a command that connects, without TLS and without a key, to services it starts itself: they
    inherit its environment.
    """
    for name in sorted(filter(_REQUIRE_TLS_OR_KEYS.fullmatch, os.environ)):
        raise ConfigError(
            f"{name}: this command connects without TLS and without a key to the services that it "
            "starts; unset the variable"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def load(
    kind: type[Config],
    program: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    on_renamed: OnRenamed | None = None,
) -> Config:
    """The program's settings; `environ` None: this process's environment.

    `on_renamed` is called for each setting that is given by a former name. Raises ConfigError
    naming the flag or variable that is wrong.
    """
    schema = _Schema(kind, program)
    environ = os.environ if environ is None else environ
    values = {
        **schema.from_aliases(environ),
        **schema.from_environment(environ, on_renamed),
        **schema.from_flags(argv, on_renamed),
    }
    return kind(**values)


class _Schema:
    """The settings of one program: fields, types, flags and variables."""

    def __init__(self, kind: type[Any], program: str) -> None:
        self._program = program
        self._prefix = f"OUTRIDER_{program.upper()}_"
        self._hints = typing.get_type_hints(kind)
        self._fields: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}
        self._renamed: dict[str, str] = {
            former: name
            for name, entry in self._fields.items()
            if (former := entry.metadata["renamed_from"])
        }
        doc = kind.__doc__ or ""
        self._module = doc.split("python -m ")[1].split("`")[0] if "python -m " in doc else program

    def from_aliases(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """Values of variables that are not named after the program, such as REDIS_URL."""
        return {
            name: _parse(environ[alias], self._hints[name], alias)
            for name, entry in self._fields.items()
            if (alias := entry.metadata["env"]) and alias in environ
        }

    def from_environment(
        self, environ: Mapping[str, str], on_renamed: OnRenamed | None
    ) -> dict[str, Any]:
        """Values of the program's own variables."""
        given = {}
        for variable, text in environ.items():
            if variable.startswith(self._prefix):
                name = variable.removeprefix(self._prefix).lower()
                present = self._renamed.get(name, name)
                if present not in self._fields:
                    raise ConfigError(f"{variable}: no such setting of {self._program}")
                given[name] = _parse(text, self._hints[present], variable)
        return self._with_present_names(given, self._variable, on_renamed)

    def from_flags(self, argv: Sequence[str], on_renamed: OnRenamed | None) -> dict[str, Any]:
        """Values of flags."""
        given = {}
        for name, value in vars(self._parser().parse_args(argv)).items():
            if value is not MISSING:
                _refuse_secret(name, value)
                hint = self._hints[self._renamed.get(name, name)]
                given[name] = value if isinstance(value, bool) else _parse(value, hint, name)
        return self._with_present_names(given, _flag, on_renamed)

    def _with_present_names(
        self, given: dict[str, Any], written: Callable[[str], str], on_renamed: OnRenamed | None
    ) -> dict[str, Any]:
        """`given` with former names replaced. Raises ConfigError where both names are given."""
        values = dict(given)
        for former in sorted(given.keys() & self._renamed.keys()):
            present = self._renamed[former]
            if present in given:
                raise ConfigError(
                    f"{written(former)}: cannot be combined with {written(present)}, its new name"
                )
            values[present] = values.pop(former)
            if on_renamed is not None:
                on_renamed(written(former), written(present))
        return values

    def _variable(self, name: str) -> str:
        return f"{self._prefix}{name.upper()}"

    def _parser(self) -> _Parser:
        parser = _Parser(prog=f"python -m {self._module}", allow_abbrev=False)
        parser.add_argument("--version", action="version", version=f"outrider {__version__}")
        for name, entry in self._fields.items():
            default = "" if entry.default in (None, "") else f"; default: {entry.default}"
            help = f"{entry.metadata['help']} [{self._variable(name)}{default}]"
            _add_flag(parser, name, self._hints[name], help.replace("%", "%%"))
        for former, present in self._renamed.items():
            _add_flag(parser, former, self._hints[present], argparse.SUPPRESS)
        return parser


def _refuse_secret(name: str, value: Any) -> None:
    """Raises ConfigError: every user of the machine can read command lines."""
    if name == "redis_url" and has_password(value):
        raise ConfigError(
            "--redis-url: no password on a command line; give the URL in the environment, or "
            "--redis-password-file"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_flag(parser: _Parser, name: str, hint: Any, help: str) -> None:
    shown: dict[str, Any] = {"help": help, "default": MISSING}
    if hint is bool:
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, **shown)
    else:
        parser.add_argument(_flag(name), metavar=_type_name(hint).upper(), **shown)


def _base_type(hint: Any) -> tuple[Any, bool]:
    """The type, and whether None is allowed as well."""
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
        allowed = "true, 1, false or 0" if kind is bool else f"of type {_type_name(hint)}"
        raise ConfigError(f"{name}: {text!r} is not {allowed}") from None
