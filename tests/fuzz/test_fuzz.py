"""A few hundred hostile messages for each service; `python -m tests.fuzz` sends a hundred thousand.

Real processes on simulated tiers, and in this process tiny models, for the samplers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.fuzz.campaign import fuzz
from tests.fuzz.corpus import VOCAB_SIZE
from tests.fuzz.fronts import SERVICES, connected
from tests.fuzz.healthy import SimulatedTruth
from tests.fuzz.system import System, running
from tests.services.parts import Greedy, Pair, both_tiers

pytestmark = pytest.mark.asyncio(loop_scope="module")
NUM_MESSAGES = 400
NUM_SAMPLED = 200


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    async with running(tmp_path_factory.mktemp("logs")) as system:
        yield system


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
async def test_nothing_hostile_disturbs_a_service(service: str, system: System) -> None:
    """Nor a healthy session beside it; and nothing is left of it."""
    async with connected(system.addresses) as fronts:
        report = await fuzz(
            fronts,
            service,
            SimulatedTruth(VOCAB_SIZE),
            num_messages=NUM_MESSAGES,
            seed=1,
            pid=system.pids[service],
        )
    assert report.findings.defects == [], report
    assert report.findings.num_healthy_tokens > 0
    assert [line for name in system.addresses for line in system.raised(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("service", ["target", "draft"])
async def test_nor_a_model_with_samplers(service: str, pair: Pair, greedy: Greedy) -> None:
    """All sampling parameters are honoured or refused by name, whatever they are."""
    truth = greedy if service == "target" else Greedy(pair.draft)
    async with both_tiers(pair, target_kv=131_072, draft_kv=131_072) as tiers:
        target, draft = tiers.endpoints
        assert draft is not None, "there is one"
        async with connected({"target": target, "draft": draft}) as fronts:
            report = await fuzz(fronts, service, truth, num_messages=NUM_SAMPLED, seed=2)
    assert report.findings.defects == [], report
