"""The flags with which a command reaches an orchestrator: TLS and a key. Light to import.

A key is never a flag, which every user of the machine sees: a file holds it, or the environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.settings.loader import api_key_variable

if TYPE_CHECKING:
    from outrider.client.channel import Access


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """To be inherited by a command's options."""

    tls_ca: Annotated[
        str | None,
        typer.Option(
            envvar="OUTRIDER_TLS_CA",
            help="PEM file: who signs the orchestrator's certificate. Default: no TLS.",
        ),
    ] = None
    tls_cert: Annotated[
        str | None,
        typer.Option(envvar="OUTRIDER_TLS_CERT", help="PEM file: a certificate to show."),
    ] = None
    tls_key: Annotated[
        str | None, typer.Option(envvar="OUTRIDER_TLS_KEY", help="PEM file: its key.")
    ] = None
    api_key_file: Annotated[
        str | None,
        typer.Option(
            envvar="OUTRIDER_API_KEY_FILE",
            help="File that holds your key. Default: the variable OUTRIDER_API_KEY, if it is set.",
        ),
    ] = None

    @property
    def access(self) -> Access:
        """Reads the key's file. Raises ConfigError."""
        from outrider.client.channel import Access, read_key

        key = api_key_variable() if self.api_key_file is None else read_key(self.api_key_file)
        return Access(self.tls_ca, self.tls_cert, self.tls_key, key)
