"""Security of the orchestrator: API keys for clients, TLS on both sides, from its settings.

Reloads each file when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import structlog

from orchestrator.admission.api_keys import ApiKeyInterceptor, ApiKeys
from orchestrator.admission.shared_quota import SharedQuotas
from outrider.client.channel import OpenChannel, TlsChannels, open_plain
from outrider.runtime.server_security import ServerProtection, server_protection
from outrider.security.keys import watched_keys
from outrider.security.pem import watched_pem
from outrider.settings.addresses import is_loopback
from outrider.settings.services import OrchestratorConfig

log = structlog.get_logger()


class Security:
    """API keys, channels to the tiers and server protection. Create it once, at the start.

    `api_keys` None: no key is required.

    Raises ConfigError for unusable files.
    """

    def __init__(self, config: OrchestratorConfig, metered: str) -> None:
        """`metered`: full name of the method whose calls count as streams of a key."""
        self.api_keys: ApiKeys | None = None
        interceptors = []
        if config.api_keys_file is not None:
            keys = watched_keys(config.api_keys_file)
            shared = SharedQuotas(
                config.redis,
                session_ttl_s=config.session_ttl_s,
                max_sessions=config.max_sessions_per_key,
            )
            self.api_keys = ApiKeys(keys, shared)
            interceptors.append(ApiKeyInterceptor(self.api_keys, metered))
        self._channels = _tier_channels(config)
        self.protection: ServerProtection = server_protection(
            config, interceptors, config.tier_tls_cert
        )
        _warn(config)

    @property
    def open_channel(self) -> OpenChannel:
        """Opens a channel to a replica of a tier."""
        return self._channels.open if self._channels is not None else open_plain

    @contextlib.asynccontextmanager
    async def reloading(self, on_new_credentials: Callable[[], None]) -> AsyncIterator[None]:
        """Reloads keys and the tiers' credentials when their files change, for the block."""
        async with contextlib.AsyncExitStack() as stack:
            if self.api_keys is not None:
                await stack.enter_async_context(self.api_keys.shared.running())
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            watching = []
            if self._channels is not None:
                files = self._channels.files
                watching.append(tasks.create_task(files.follow(on_new_credentials)))
            if self.api_keys is not None:
                watching.append(tasks.create_task(self.api_keys.keys.follow()))
            try:
                yield
            finally:
                for task in watching:
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
    """Warns of settings that expose the orchestrator to the network without protection."""
    if is_loopback(config.host):
        return
    if config.api_keys_file is None and config.tls_client_ca is None:
        log.warning("open_to_all", host=config.host, why="neither api_keys_file nor tls_client_ca")
    elif config.tls_cert is None:
        log.warning("keys_in_plain_text", host=config.host, why="tls_cert is unset")
