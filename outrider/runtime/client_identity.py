"""Lets in callers whose certificate has one of some names; that its authority is ours, TLS knows.

For the tiers: whoever has a certificate of the same authority is not yet the orchestrator.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any

from outrider.errors import PermissionDenied
from outrider.runtime.interceptors import AccessInterceptor, Context, Reason

# gRPC's name for the DNS names among a certificate's subject alternative names.
_DNS_NAMES = "peer_dns"


class IdentityInterceptor(AccessInterceptor):
    """Asked once per call; a stream's messages cost nothing."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    @contextlib.asynccontextmanager
    async def around(self, context: Context, method: str) -> AsyncIterator[None]:
        self._check(context, method)
        yield

    def _check(self, context: Context, method: str) -> None:
        shown = {name.decode(errors="replace") for name in dns_names(context)}
        if not shown & self._names:
            self.refusals.say(context, method, Reason.IDENTITY, f"names {sorted(shown)}")
            raise PermissionDenied(
                "the certificate's names are not among those that may call: "
                f"{', '.join(sorted(shown)) or 'it has none'}"
            )


def dns_names(context: Context) -> list[bytes]:
    """Of the caller's certificate, which TLS has verified."""
    said: Any = context.auth_context()
    return list(said.get(_DNS_NAMES, ()))
