"""Connection age: clients of old connections find new orchestrators; running streams continue."""

from __future__ import annotations

import asyncio

import pytest

from outrider.client import AsyncClient
from outrider.errors import ConfigError
from outrider.settings.services import OrchestratorConfig
from tests.services.parts import GREEDY, Tiers, orchestrating
from tests.services.proxies import balancer
from tests.services.replicas import PROMPT, TIMEOUT_S, Gate, tier
from tests.stack import eventually, request


@pytest.mark.slow
async def test_a_new_orchestrator_gets_calls_and_a_running_stream_continues(
    redis_url: str, gate: Gate
) -> None:
    """One connection through a connection balancer; no call fails."""
    async with (
        tier() as target,
        orchestrating(
            Tiers(target.server, None), redis_url, connection_age_s=0.5, gamma=1
        ) as first,
        orchestrating(Tiers(target.server, None), redis_url, gamma=2) as second,
    ):
        endpoints = [first.endpoint]
        async with balancer(endpoints) as endpoint, AsyncClient(endpoint, resume_for_s=0) as client:
            gate.shut()
            asked = request(PROMPT, {**GREEDY, "max_tokens": 5})
            calling = asyncio.create_task(client.stream(asked, timeout_s=TIMEOUT_S).result())
            await eventually(gate.holds_a_pass)
            endpoints.append(second.endpoint)

            async def reaches_the_second() -> bool:
                return (await client.models()).default_gamma == 2

            await eventually(reaches_the_second)
            assert not calling.done()
            gate.open()
            assert len((await calling).token_ids) == 5


@pytest.mark.parametrize("name", ["connection_age_s", "connection_age_grace_s"])
@pytest.mark.parametrize("value", [-1.0, 2_000_001.0, float("nan")])
def test_ages_out_of_grpcs_range_are_rejected(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: must be from 0 to 2000000"):
        OrchestratorConfig(target_endpoint="a:1", **{name: value})  # type: ignore[arg-type]
