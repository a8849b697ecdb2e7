"""Helpers of the security tests: a certificate authority, a secured system of simulated tiers."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import trustme

import draft_service.app
import orchestrator.app
import target_service.app
from outrider.client.channel import Access, TlsChannels, open_channel
from outrider.runtime.grpc_server import Server
from outrider.security.keys import KeyLimits, new_key
from outrider.security.pem import watched_pem
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc, target_pb2, target_pb2_grpc
from tests.stack import Output, request

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
SIMULATED = "step_ms=2,vocab_size=1000"
DRAFT = "step_ms=0.2,vocab_size=1000,survival=0.8"
ROOM: dict[str, Any] = {
    "kv_cache_tokens": 65_536,
    "calibration_s": 0.0,
    "port": 0,
    "stuck_after_s": 60.0,
}


class Authority:
    """Certificate authority, in files. `renew` replaces it: earlier certificates are invalid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.renew()

    @property
    def ca(self) -> str:
        return str(self.folder / "ca.pem")

    def renew(self) -> None:
        self._authority = trustme.CA()
        replace(self.folder / "ca.pem", self._authority.cert_pem.bytes())

    def issue(self, who: str, *names: str) -> tuple[str, str]:
        """Paths of a certificate and its key for DNS names or addresses (default: `who`)."""
        leaf = self._authority.issue_cert(*(names or (who,)))
        cert, key = self.folder / f"{who}.pem", self.folder / f"{who}.key"
        replace(key, leaf.private_key_pem.bytes())
        replace(cert, b"".join(part.bytes() for part in leaf.cert_chain_pems))
        return str(cert), str(key)

    def issue_until(self, who: str, end: datetime) -> None:
        """Renews a certificate that expires at `end`."""
        leaf = self._authority.issue_cert(who, not_after=end)
        replace(self.folder / f"{who}.key", leaf.private_key_pem.bytes())
        replace(self.folder / f"{who}.pem", b"".join(p.bytes() for p in leaf.cert_chain_pems))

    def tier(self, who: str, **more: Any) -> dict[str, Any]:
        """Settings of a tier with mutual TLS."""
        cert, key = self.issue(who)
        return {"tls_cert": cert, "tls_key": key, "tls_client_ca": self.ca, **more}


def as_openssl_has_it(authority: Authority, who: str) -> float:
    """Expiry by Python's own decoder of certificates, which only reads files."""
    decoded = ssl._ssl._test_decode_cert(str(authority.folder / f"{who}.pem"))  # type: ignore[attr-defined]
    return float(ssl.cert_time_to_seconds(decoded["notAfter"]))


def replace(path: Path, content: bytes | str) -> None:
    """Replaces a file atomically, as Kubernetes does."""
    new = path.with_suffix(".new")
    new.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(new, path)


def write_keys(path: Path, **limits: KeyLimits) -> dict[str, str]:
    """Writes a keys file; returns the keys by name."""
    keys = {name: new_key(name, limit) for name, limit in limits.items()}
    replace(path, "".join(f"{line}\n" for _, line in keys.values()))
    return {name: key for name, (key, _) in keys.items()}


@dataclass
class Secured:
    """A running system and its endpoint."""

    target: Server
    draft: Server
    orchestrator: Server

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.orchestrator.port}"

    @property
    def http_endpoint(self) -> str:
        return f"127.0.0.1:{self.orchestrator.http_port}"


@contextlib.asynccontextmanager
async def tiers(
    target: dict[str, Any] | None = None, draft: dict[str, Any] | None = None
) -> AsyncIterator[tuple[Server, Server]]:
    """A simulated target and draft with these settings."""
    targets = TargetConfig(simulate=SIMULATED, **ROOM, **(target or {}))
    drafts = DraftConfig(simulate=DRAFT, **ROOM, **(draft or {}))
    async with (
        target_service.app.serving(targets) as target_server,
        draft_service.app.serving(drafts) as draft_server,
    ):
        yield target_server, draft_server


@contextlib.asynccontextmanager
async def orchestrated(
    servers: tuple[Server, Server], redis_url: str, **settings: Any
) -> AsyncIterator[Secured]:
    """An orchestrator of these tiers with these settings."""
    settings.setdefault("draft_wait_ms", 20_000.0)
    target, draft = servers
    config = OrchestratorConfig(
        target_endpoint=f"127.0.0.1:{target.port}",
        draft_endpoint=f"127.0.0.1:{draft.port}",
        redis_url=redis_url,
        port=0,
        **settings,
    )
    async with orchestrator.app.serving(config) as server:
        yield Secured(target, draft, server)


@contextlib.asynccontextmanager
async def secured(authority: Authority, redis_url: str, **settings: Any) -> AsyncIterator[Secured]:
    """A system with mutual TLS to the tiers and TLS for clients; `settings` of the orchestrator."""
    cert, key = authority.issue("server", "127.0.0.1", "localhost")
    tier_cert, tier_key = authority.issue("orchestrator")
    settings = {
        "tls_cert": cert,
        "tls_key": key,
        "tier_tls_ca": authority.ca,
        "tier_tls_cert": tier_cert,
        "tier_tls_key": tier_key,
        "tier_tls_name": "tier",
        **settings,
    }
    tier = authority.tier("tier")
    async with (
        tiers(tier, tier) as servers,
        orchestrated(servers, redis_url, **settings) as system,
    ):
        yield system


@contextlib.asynccontextmanager
async def client(
    endpoint: str, access: Access | None = None
) -> AsyncIterator[orchestrator_pb2_grpc.OrchestratorServiceStub]:
    async with open_channel(endpoint, access) as channel:
        yield orchestrator_pb2_grpc.OrchestratorServiceStub(channel)


async def generated(
    stub: Any, prompt: Sequence[int] = (1, 2, 3), num_tokens: int = 8, **fields: Any
) -> Output:
    """Output of one greedy generation."""
    output = Output()
    asked = request(list(prompt), {**GREEDY, "max_tokens": num_tokens}, **fields)
    async for chunk in stub.Generate(asked, timeout=120):
        output.add(chunk)
    assert output.result is not None
    return output


async def model_info(stub: Any) -> Any:
    """Does not wait for a connection: a refusal is raised at once."""
    return await stub.GetModelInfo(orchestrator_pb2.GetModelInfoRequest(), timeout=60)


def plain(endpoint: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(endpoint)


def channels(authority: Authority, who: str, server: str = "tier", ca: str | None = None) -> Any:
    """Channels to a tier with the certificate of `who`."""
    cert, key = authority.issue(who)
    files = watched_pem(ca=ca or authority.ca, cert=cert, key=key, ca_name="ca", cert_name="cert")
    return TlsChannels(files, server)


async def asked_target(channel: Any) -> Any:
    stub = target_pb2_grpc.TargetServiceStub(channel)
    return await stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest(), timeout=60)
