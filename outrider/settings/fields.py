"""What settings are made of: a field with its help, and the checks that name it.

Knows no setting; `outrider.settings.services` has them.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from outrider.errors import ConfigError
from outrider.replica import split_address


def setting(default: Any, help: str, env: str | None = None, *, may_be_secret: bool = False) -> Any:
    """A field with its help text and, where users know one, a further variable's name.

    One that may hold a secret is not shown with its settings.
    """
    return field(default=default, metadata={"help": help, "env": env}, repr=not may_be_secret)


def require(holds: bool, name: str, why: str) -> None:
    """Raises ConfigError that names the setting unless `holds`."""
    if not holds:
        raise ConfigError(f"{name}: {why}")


def require_address(address: str, name: str) -> None:
    """Raises ConfigError that names the setting unless it is host:port."""
    try:
        split_address(address)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def require_port(port: int, name: str = "port") -> None:
    """Raises ConfigError that names the setting unless it is a port, or 0 for a free one."""
    require(0 <= port <= 65535, name, f"{port} is not in [0, 65535]")
