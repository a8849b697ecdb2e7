"""Settings fields with help texts, and checks whose errors name the setting.

`outrider.settings.services` declares the settings, `outrider.settings.addresses` checks addresses.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from outrider.errors import ConfigError


def setting(
    default: Any,
    help: str,
    env: str | None = None,
    *,
    renamed_from: str | None = None,
    may_be_secret: bool = False,
) -> Any:
    """A dataclass field with its help text.

    `env`: another environment variable that also sets it. `renamed_from`: the setting's former
    name, which still works, with a warning. `may_be_secret`: leave the value out of the `repr`.
    """
    metadata = {"help": help, "env": env, "renamed_from": renamed_from}
    return field(default=default, metadata=metadata, repr=not may_be_secret)


def require(condition: bool, name: str, why: str) -> None:
    """Raises ConfigError `name: why` unless the condition is true."""
    if not condition:
        raise ConfigError(f"{name}: {why}")


def require_port(port: int, name: str = "port") -> None:
    """Raises ConfigError that names the setting unless it is a port, or 0 for a free one."""
    require(0 <= port <= 65535, name, f"{port} is not in [0, 65535]")
