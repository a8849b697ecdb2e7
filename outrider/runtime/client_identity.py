"""Interceptor that accepts clients by the DNS names in their certificate.

Used by the tiers: a valid certificate of the same authority does not make a client an orchestrator.
TLS has verified the authority already.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any

from outrider.errors import PermissionDenied
from outrider.runtime.interceptors import AccessInterceptor, Context, Reason

# gRPC's key for the DNS names among a certificate's subject alternative names.
_DNS_NAMES = "peer_dns"


class IdentityInterceptor(AccessInterceptor):
    """Checks the names once per call, not per message of a stream."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    @contextlib.asynccontextmanager
    async def around(self, context: Context, method: str) -> AsyncIterator[None]:
        self._check(context, method)
        yield

    def _check(self, context: Context, method: str) -> None:
        names = {name.decode(errors="replace") for name in dns_names(context)}
        if not names & self._names:
            self.refusals.record(context.peer(), method, Reason.IDENTITY, f"names {sorted(names)}")
            raise PermissionDenied(
                "no DNS name of the client certificate is allowed: "
                f"{', '.join(sorted(names)) or 'it has none'}"
            )


def dns_names(context: Context) -> list[bytes]:
    """The DNS names of the client's certificate, which TLS has verified."""
    auth: Any = context.auth_context()
    return list(auth.get(_DNS_NAMES, ()))
