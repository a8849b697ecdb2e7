"""Flags for TLS and the API key of commands that connect to an orchestrator.

The key is read from a file or the environment, never from a flag: all users of a machine can read
command lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.settings.loader import api_key_variable

if TYPE_CHECKING:
    from outrider.client.channel import Access


# Heading of these flags in --help.
CONNECTION = "Connection"


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Base class for the options of such a command."""

    tls_ca: Annotated[
        str | None,
        typer.Option(
            envvar="OUTRIDER_TLS_CA",
            help="PEM file: CA of the orchestrator's certificate. Default: no TLS.",
            rich_help_panel=CONNECTION,
        ),
    ] = None
    tls_cert: Annotated[
        str | None,
        typer.Option(
            envvar="OUTRIDER_TLS_CERT",
            help="PEM file: client certificate.",
            rich_help_panel=CONNECTION,
        ),
    ] = None
    tls_key: Annotated[
        str | None,
        typer.Option(
            envvar="OUTRIDER_TLS_KEY",
            help="PEM file: private key of --tls-cert.",
            rich_help_panel=CONNECTION,
        ),
    ] = None
    api_key_file: Annotated[
        str | None,
        typer.Option(
            envvar="OUTRIDER_API_KEY_FILE",
            help="File with your API key. Default: the key in the variable OUTRIDER_API_KEY.",
            rich_help_panel=CONNECTION,
        ),
    ] = None

    @property
    def access(self) -> Access:
        """The credentials; reads the key's file. Raises ConfigError."""
        from outrider.client.channel import Access, read_key

        key = api_key_variable() if self.api_key_file is None else read_key(self.api_key_file)
        return Access(self.tls_ca, self.tls_cert, self.tls_key, key)
