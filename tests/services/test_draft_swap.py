"""A new draft joins the tier under load: a better one takes over, a bad one is rolled back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

import draft_service.app
import orchestrator.replicas.rollout
import orchestrator.startup
from orchestrator.replicas.rollout import RolloutTiming
from outrider.settings.services import DraftConfig
from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.services.parts import Pair, System, both_tiers, orchestrating
from tests.stack import eventually
from tests.telemetry.parts import Scrape, get
from tests.tiny_models import make_tiny_draft, make_tiny_model

_NUM_TOKENS = 24
_NUM_CLIENTS = 8
_GREEDY = {"temperature": 0.0, "max_tokens": _NUM_TOKENS, "ignore_eos": True}
_COUPLED = {"temperature": 1.0, "seed": 5, "max_tokens": _NUM_TOKENS, "ignore_eos": True}
_CALLS: list[dict[str, Any]] = [
    {"prompt": [3 + i, 50, 9 * i % 200, 7], "sampling": sampling, **fields}
    for i in range(6)
    for sampling, fields in (
        (_GREEDY, {}),
        (_COUPLED, {"verification": sampling_pb2.VERIFICATION_COUPLED}),
    )
]


@dataclass
class Load:
    """Clients that generate until they are stopped, at all orchestrators."""

    systems: list[System]
    expected: list[list[int]]
    num_done: int = 0
    problems: list[str] = field(default_factory=list)

    async def _client(self, number: int, stop: asyncio.Event) -> None:
        for i in itertools.count(number):
            if stop.is_set():
                return
            call, expected = _CALLS[i % len(_CALLS)], self.expected[i % len(_CALLS)]
            try:
                output = await self.systems[i % len(self.systems)].generate(**call)
            except grpc.aio.AioRpcError as error:
                self.problems.append(f"{error.code()}: {error.details()}")
                continue
            if output.token_ids != expected:
                self.problems.append(f"call {i % len(_CALLS)}: other tokens")
            self.num_done += 1

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for number in range(_NUM_CLIENTS):
                tasks.create_task(self._client(number, stop))
            yield
            stop.set()
        assert self.problems == []


class Drafts:
    """Draft replicas in this process that join and leave the registry."""

    def __init__(self, redis: str) -> None:
        self._redis = redis

    @contextlib.asynccontextmanager
    async def joined(self, model: Path) -> AsyncIterator[None]:
        config = DraftConfig(
            model=str(model), port=0, kv_cache_tokens=16_384, calibration_s=0.0,
            redis_url=self._redis, stop_grace_s=0.5,
        )  # fmt: skip
        async with draft_service.app.serving(config):
            yield


async def rollout_of(system: System) -> orchestrator_pb2.DraftRollout:
    request = orchestrator_pb2.GetModelInfoRequest()
    return (await system.client.GetModelInfo(request)).draft_rollout


async def has_roles(systems: list[System], **roles: str) -> None:
    """Waits until all orchestrators see these roles, by the name of the model's directory."""

    async def have() -> bool:
        for system in systems:
            found = {
                Path(revision.model).name: orchestrator_pb2.DraftRole.Name(revision.role)
                for revision in (await rollout_of(system)).revisions
                if revision.model
            }
            if found != {name: f"DRAFT_ROLE_{role.upper()}" for name, role in roles.items()}:
                return False
        return True

    await eventually(have)


def rates_by_revision(scrape: Scrape) -> dict[str, float]:
    accepted, rejected = (
        scrape.by(f"outrider_draft_revision_{what}_tokens_total", "revision")
        for what in ("accepted", "rejected")
    )
    return {revision: num / (num + rejected[revision]) for revision, num in accepted.items()}


@pytest.fixture
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = RolloutTiming(interval_s=0.1, settle_s=0.2, absent_s=1.0, spread_s=0.2)
    monkeypatch.setattr(orchestrator.replicas.rollout, "RolloutTiming", lambda: timing)
    # The first draft joins after the orchestrators' start.
    monkeypatch.setattr(orchestrator.startup, "DRAFT_START_TIMEOUT_S", 0.1)


@pytest.mark.usefixtures("_quickly")
async def test_a_better_draft_takes_over_under_load_and_a_bad_one_is_rolled_back(
    tmp_path: Path, redis_url: str
) -> None:
    """Nobody decides but the orchestrators. No call fails; tokens are those without a draft.

    α of the drafts is about 0.2 (old), 0.85 and 0.1 (bad), with a standard deviation of about 0.15
    between generations. Another outcome needs means of five generations ten standard errors away.
    """
    target = make_tiny_model("llama", tmp_path / "target", scale=0.5)
    old = make_tiny_draft(target, tmp_path / "old", noise=0.2)
    better = make_tiny_draft(target, tmp_path / "better", noise=0.02)
    bad = make_tiny_model("llama", tmp_path / "bad", scale=0.5, seed=7)
    drafts = Drafts(redis_url)
    settings: dict[str, Any] = {
        "draft_endpoint": "registry",
        "draft_canary_share": 0.5,
        "draft_canary_min_generations": 5,
    }
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        tiers = await enter(both_tiers(Pair(target, old), draft_kv=None))
        systems = [
            await enter(orchestrating(tiers, redis_url, metrics_port=0, **settings))
            for _ in range(2)
        ]
        expected = [(await systems[0].generate(**call, gamma=0)).token_ids for call in _CALLS]
        load = Load(systems, expected)
        await enter(load.running())
        async with contextlib.AsyncExitStack() as leaves:
            await leaves.enter_async_context(drafts.joined(old))
            await has_roles(systems, old="current")
            await enter(drafts.joined(better))
            await has_roles(systems, old="superseded", better="current")
        await has_roles(systems, better="current")
        await enter(drafts.joined(bad))
        await has_roles(systems, better="current", bad="rolled_back")
        num_done = load.num_done

        async def goes_on() -> bool:
            return load.num_done > num_done + 2 * _NUM_CLIENTS

        await eventually(goes_on)
        for system in systems:
            rollout = await rollout_of(system)
            assert " rolled back: acceptance rate 0." in rollout.decision
            rates = rates_by_revision(Scrape(await get(system.metrics_port)))
            names = {Path(r.model).name: rates[r.revision] for r in rollout.revisions if r.model}
            assert names["bad"] < 0.2 < 0.7 < names["better"]


@pytest.mark.usefixtures("_quickly")
async def test_drafts_of_different_size_all_serve_and_change_no_token(
    tmp_path: Path, redis_url: str
) -> None:
    """With `draft_choice=fastest` both remain; half of the generations get a random one."""
    target = make_tiny_model("llama", tmp_path / "target", scale=0.5)
    large = make_tiny_draft(target, tmp_path / "large", noise=0.02)
    small = make_tiny_model("llama", tmp_path / "small", scale=0.5, num_layers=1, seed=7)
    drafts = Drafts(redis_url)
    settings: dict[str, Any] = {
        "draft_endpoint": "registry", "draft_choice": "fastest", "draft_canary_share": 0.5,
    }  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        tiers = await enter(both_tiers(Pair(target, large), draft_kv=None))
        system = await enter(orchestrating(tiers, redis_url, metrics_port=0, **settings))
        expected = [(await system.generate(**call, gamma=0)).token_ids for call in _CALLS]
        await enter(drafts.joined(large))
        await enter(drafts.joined(small))
        await has_roles([system], large="current", small="current")
        await enter(Load([system], expected).running())

        async def have_drafted() -> bool:
            scrape = Scrape(await get(system.metrics_port))
            counts = scrape.by("outrider_draft_revision_draft_tokens_total", "revision")
            return len(counts) == 2 and min(counts.values()) > 0

        await eventually(have_drafted)
