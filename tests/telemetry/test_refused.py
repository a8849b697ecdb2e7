"""Calls rejected by an interceptor are counted by reason, and in no other metric."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from outrider.client.channel import Access
from outrider.security.keys import KeyLimits
from tests.security.parts import (
    Authority,
    as_openssl_has_it,
    asked_target,
    channels,
    client,
    generated,
    orchestrated,
    tiers,
    write_keys,
)
from tests.services.parts import refusal
from tests.telemetry.parts import scrape

METERED = {"metrics_port": 0}
NAME = "outrider_calls_refused_total"
ENDS = "outrider_certificate_expires_at_seconds"
NONE = {"no_key": 0, "unknown_key": 0, "over_limit": 0, "over_sessions": 0, "identity": 0}
BY_ADMISSION = {"queue_full": 0, "displaced": 0, "deadline": 0}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


async def test_clients_without_a_valid_key(tmp_path: Path, redis_url: str) -> None:
    """Includes a key over its limit. Calls rejected by the method are not counted here."""
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(), bob=KeyLimits(tokens_per_minute=1))
    settings = {"api_keys_file": str(tmp_path / "keys"), **METERED}
    async with tiers() as servers, orchestrated(servers, redis_url, **settings) as system:
        assert (await scrape(system.orchestrator)).by(NAME, "reason") == NONE | BY_ADMISSION
        async with client(system.endpoint, Access(api_key=keys["bob"])) as stub:
            await generated(stub)
            for _ in range(3):
                assert (await refusal(generated(stub))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with client(system.endpoint) as stub:
            assert (await refusal(generated(stub))).code is grpc.StatusCode.UNAUTHENTICATED
        async with client(system.endpoint, Access(api_key="guess")) as stub:
            for _ in range(2):
                assert (await refusal(generated(stub))).code is grpc.StatusCode.UNAUTHENTICATED
        async with client(system.endpoint, Access(api_key=keys["ada"])) as stub:
            refused = await refusal(generated(stub, prompt=[]))
            assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        exposed = await scrape(system.orchestrator)
    counted = {"no_key": 1, "unknown_key": 2, "over_limit": 3}
    assert exposed.by(NAME, "reason") == NONE | BY_ADMISSION | counted
    assert exposed.counted("outrider_requests_total", "status") == {"OK": 1, "INVALID_ARGUMENT": 1}


@pytest.mark.parametrize("name", ["orchestrator", "mallory"])
async def test_clients_of_a_tier_by_certificate(authority: Authority, name: str) -> None:
    tier = authority.tier("tier", tls_client_names="orchestrator", **METERED)
    async with tiers(tier, tier) as (target, _):
        async with channels(authority, name).open(f"127.0.0.1:{target.port}") as channel:
            if name == "orchestrator":
                await asked_target(channel)
            else:
                refused = await refusal(asked_target(channel))
                assert refused.code is grpc.StatusCode.PERMISSION_DENIED
        exposed = await scrape(target)
    assert exposed.by(NAME, "reason") == NONE | {"identity": int(name == "mallory")}


async def test_certificate_expiry(authority: Authority) -> None:
    """Follows the file as soon as it is renewed, without a new connection."""
    async with tiers(authority.tier("tier", **METERED)) as (target, _):
        first = (await scrape(target)).by(ENDS, "use")
        assert first == {"server": as_openssl_has_it(authority, "tier")}
        authority.issue_until("tier", datetime(2051, 2, 3, 4, 5, 6, tzinfo=UTC))
        assert (await scrape(target)).by(ENDS, "use") == {
            "server": as_openssl_has_it(authority, "tier")
        }
