"""The orchestrator's side of who may talk to whom, put together from its settings.

Owns which of its parts follow which files. Knows no request and no tier's protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import structlog

from orchestrator.admission.api_keys import ApiKeyInterceptor
from orchestrator.admission.shared_quota import SharedQuotas
from outrider.client.channel import OpenChannel, TlsChannels, open_plain
from outrider.runtime.server_security import ServerProtection, is_loopback, server_protection
from outrider.security.keys import watched_keys
from outrider.security.pem import watched_pem
from outrider.settings.services import OrchestratorConfig

log = structlog.get_logger()


class Security:
    """Made once at the start. Raises ConfigError for files that cannot be used."""

    def __init__(self, config: OrchestratorConfig, metered: str) -> None:
        """`metered`: the full name of the method that a key's limits are for."""
        self._gate = None
        if config.api_keys_file is not None:
            keys = watched_keys(config.api_keys_file)
            shared = SharedQuotas(
                config.redis,
                session_ttl_s=config.session_ttl_s,
                max_sessions=config.max_sessions_per_key,
            )
            self._gate = ApiKeyInterceptor(keys, metered, shared)
        self._channels = _tier_channels(config)
        self.protection: ServerProtection = server_protection(
            config, [self._gate] if self._gate is not None else [], config.tier_tls_cert
        )
        _warn(config)

    @property
    def open_channel(self) -> OpenChannel:
        """To a tier's replica."""
        return self._channels.open if self._channels is not None else open_plain

    @contextlib.asynccontextmanager
    async def following(self, on_new_credentials: Callable[[], None]) -> AsyncIterator[None]:
        """Keeps keys and the tiers' credentials as their files are, for the time of a block."""
        async with contextlib.AsyncExitStack() as stack:
            if self._gate is not None:
                await stack.enter_async_context(self._gate.shared.running())
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            following = []
            if self._channels is not None:
                files = self._channels.files
                following.append(tasks.create_task(files.follow(on_new_credentials)))
            if self._gate is not None:
                following.append(tasks.create_task(self._gate.keys.follow()))
            try:
                yield
            finally:
                for task in following:
                    task.cancel()


def _tier_channels(config: OrchestratorConfig) -> TlsChannels | None:
    if config.tier_tls_ca is None:
        return None
    files = watched_pem(
        ca=config.tier_tls_ca,
        cert=config.tier_tls_cert,
        key=config.tier_tls_key,
        ca_name="tier_tls_ca",
        cert_name="tier_tls_cert",
    )
    return TlsChannels(files, config.tier_tls_name)


def _warn(config: OrchestratorConfig) -> None:
    """What others on the network could do, that the operator may not have meant."""
    if is_loopback(config.host):
        return
    if config.api_keys_file is None and config.tls_client_ca is None:
        log.warning("open_to_all", host=config.host, why="neither api_keys_file nor tls_client_ca")
    elif config.tls_cert is None:
        log.warning("keys_in_plain_text", host=config.host, why="tls_cert is unset")
