"""The draft rollout: which revision generations get, and how orchestrators decide together."""

from __future__ import annotations

import random
from typing import Any

import pytest
from structlog.testing import capture_logs

from orchestrator.replicas.rollout import (
    CONFIRMED,
    PROMOTED,
    REPLACED,
    ROLLED_BACK,
    Assignment,
    DraftRollout,
    RolloutTiming,
)
from orchestrator.speculation.draft_speed import DraftSpeed
from outrider.draft_rollout import Role
from outrider.redis.connection import RedisConnection
from outrider.redis.rollout_store import RolloutStore, stored_targets
from outrider.replica import CostReport
from outrider.settings.draft_canary import DraftCanarySettings

TARGET = "target"
OLD, NEW = "old", "new"
_SHARE = 0.25


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Tier:
    """Orchestrators that share a draft tier, a clock and a Redis."""

    def __init__(self, redis: str, num_orchestrators: int = 2, **settings: Any) -> None:
        self.replicas = {OLD: 2}
        self.clock = Clock()
        self.random = random.Random(0)
        self.rollouts: list[DraftRollout] = []
        self.stores: list[RolloutStore] = []
        self.draft_step_s: dict[str, float] = {}
        self._redis = redis
        self._settings = DraftCanarySettings(**{"draft_canary_share": _SHARE, **settings})
        for _ in range(num_orchestrators):
            self.add()

    def add(self) -> DraftRollout:
        rollout = DraftRollout(
            lambda: self.replicas,
            self._settings,
            RolloutTiming(),
            clock=self.clock,
            draw=self.random.random,
            speed=self.speed,
        )
        self.rollouts.append(rollout)
        self.stores.append(RolloutStore(self._redis, TARGET))
        return rollout

    def speed(self, revision: str) -> DraftSpeed | None:
        """With a target pass of 20 ms; None without a measured cost."""
        step_s = self.draft_step_s.get(revision)
        target = CostReport((1, 17), (0.02, 0.03))
        return None if step_s is None else DraftSpeed(target, CostReport((1,), (step_s,)), 0.5)

    @property
    def first(self) -> DraftRollout:
        return self.rollouts[0]

    async def exchange(self, num_times: int = 3, after_s: float = 1.0) -> None:
        for _ in range(num_times):
            self.clock.now += after_s
            for rollout, store in zip(self.rollouts, self.stores, strict=True):
                await rollout.exchange(store)

    async def begin(self) -> None:
        """The old revision is current, and the new one has joined."""
        await self.exchange(num_times=5)
        self.replicas[NEW] = 1
        await self.exchange()

    async def generate(self, rates: dict[str, float], num: int, num_verified: int = 40) -> None:
        """`num` generations, spread over the orchestrators; `rates`: acceptance by revision."""
        for i in range(num):
            rollout = self.rollouts[i % len(self.rollouts)]
            assignment = rollout.assign()
            rate = min(max(rates[assignment.revision] + self.random.gauss(0, 0.1), 0), 1)
            num_accepted = round(rate * num_verified)
            rollout.observe(assignment, num_accepted, num_verified - num_accepted)
            if i % 20 == 0:
                await self.exchange(num_times=1)
        await self.exchange()

    async def close(self) -> None:
        for store in self.stores:
            await store.close()

    def roles(self) -> dict[str, str]:
        """Roles by revision; all orchestrators agree."""
        roles = [{name: r.record.role(name).value for name in (OLD, NEW)} for r in self.rollouts]
        assert all(other == roles[0] for other in roles)
        return roles[0]

    def num_decisions(self, decision: str) -> int:
        return sum(rollout.decisions[decision] for rollout in self.rollouts)


@pytest.fixture
async def tier(redis_url: str) -> Any:
    tier = Tier(redis_url)
    await tier.begin()
    yield tier
    await tier.close()


async def test_a_new_revision_becomes_the_canary_and_gets_its_share(tier: Tier) -> None:
    assert tier.roles() == {OLD: "current", NEW: "canary"}
    num = 4_000
    assigned = [tier.first.assign() for _ in range(num)]
    num_canary = sum(assignment.revision == NEW for assignment in assigned)
    # Six standard deviations: wrong with a probability of 2e-9.
    assert abs(num_canary - _SHARE * num) < 6 * (num * _SHARE * (1 - _SHARE)) ** 0.5


async def test_a_small_share_compares_with_a_part_of_the_others(redis_url: str) -> None:
    """Compared generations draft even if that does not pay."""
    tier = Tier(redis_url, draft_canary_share=0.1)
    await tier.begin()
    num = 4_000
    assigned = [tier.first.assign() for _ in range(num)]
    compared = [assignment.revision for assignment in assigned if assignment.is_compared]
    assert compared.count(NEW) == sum(assignment.revision == NEW for assignment in assigned)
    assert abs(compared.count(OLD) - 0.3 * num) < 6 * (num * 0.3 * 0.7) ** 0.5
    await tier.close()


async def test_a_better_revision_is_promoted_and_the_former_one_is_the_control(tier: Tier) -> None:
    with capture_logs() as logs:
        await tier.generate({OLD: 0.5, NEW: 0.7}, 200)
    assert tier.roles() == {OLD: "control", NEW: "current"}
    assert tier.num_decisions(PROMOTED) == 1, "one orchestrator decides"
    decisions = [entry["decision"] for entry in logs if entry["event"] == "draft_rollout"]
    assert len(decisions) == len(tier.rollouts), "each logs it"
    assert decisions[0].startswith("new promoted: acceptance rate 0.")


async def test_a_worse_revision_is_rolled_back_and_stays_so(tier: Tier) -> None:
    await tier.generate({OLD: 0.6, NEW: 0.1}, 200)
    assert tier.roles() == {OLD: "current", NEW: "rolled_back"}
    assert tier.num_decisions(ROLLED_BACK) == 1
    await tier.exchange(num_times=200)
    assert {tier.first.assign().revision for _ in range(1_000)} == {OLD}
    later = tier.add()  # an orchestrator that starts later
    await tier.exchange()
    assert later.record.role(NEW) is Role.ROLLED_BACK


async def test_a_slower_revision_must_be_accepted_more_often(tier: Tier) -> None:
    """Four times the cost: 0.65 instead of 0.6 is slower, so it is rolled back."""
    tier.draft_step_s = {OLD: 0.002, NEW: 0.008}
    await tier.generate({OLD: 0.6, NEW: 0.65}, 1200)
    assert tier.roles() == {OLD: "current", NEW: "rolled_back"}
    decision = tier.first.record.decision
    assert decision.startswith("new rolled back: acceptance rate 0.6")
    assert "; by its cost +0." in decision
    assert "tokens/s, with old" in decision


async def test_a_faster_revision_may_be_accepted_less_often(tier: Tier) -> None:
    tier.draft_step_s = {OLD: 0.008, NEW: 0.002}
    await tier.generate({OLD: 0.6, NEW: 0.5}, 1200)
    assert tier.roles()[NEW] == "current"


async def test_a_promoted_revision_is_rolled_back_if_it_falls(tier: Tier) -> None:
    """The traffic changes after the promotion; the control shows it."""
    await tier.generate({OLD: 0.5, NEW: 0.7}, 200)
    assert tier.roles() == {OLD: "control", NEW: "current"}
    await tier.generate({OLD: 0.5, NEW: 0.2}, 400)
    assert tier.roles() == {OLD: "current", NEW: "rolled_back"}


async def test_all_generations_use_a_revision_that_is_confirmed(tier: Tier) -> None:
    await tier.generate({OLD: 0.5, NEW: 0.7}, 1_500)
    assert tier.roles() == {OLD: "superseded", NEW: "current"}
    assert tier.num_decisions(CONFIRMED) == 1
    assert {tier.first.assign().revision for _ in range(1_000)} == {NEW}


async def test_measurements_of_all_orchestrators_count_together(redis_url: str) -> None:
    tier = Tier(redis_url, num_orchestrators=3)
    await tier.begin()
    for rollout in tier.rollouts:
        for rate in (0.25, 0.75):
            rollout.observe(Assignment(NEW, rollout.record.version, True), round(40 * rate), 10)
    await tier.exchange()
    sums = [rollout.sums[NEW] for rollout in tier.rollouts]
    assert [s.num for s in sums] == [6, 6, 6]
    assert sums[0].mean == pytest.approx((0.5 + 0.75) / 2, abs=1e-5)
    await tier.close()


async def test_short_outdated_and_other_generations_do_not_count(tier: Tier) -> None:
    version = tier.first.record.version
    tier.first.observe(Assignment(NEW, version, True), 4, 3)
    tier.first.observe(Assignment(NEW, version - 1, True), 40, 3)
    tier.first.observe(Assignment(OLD, version), 40, 3)
    await tier.exchange()
    assert tier.first.sums == {}


async def test_no_decision_before_the_minimum_number_of_generations(redis_url: str) -> None:
    tier = Tier(redis_url, draft_canary_min_generations=1_000)
    await tier.begin()
    await tier.generate({OLD: 0.9, NEW: 0.1}, 400)
    assert tier.roles() == {OLD: "current", NEW: "canary"}
    await tier.close()


async def test_with_share_0_only_the_operator_promotes(redis_url: str) -> None:
    tier = Tier(redis_url, draft_canary_share=0.0)
    await tier.begin()
    assert tier.roles() == {OLD: "current", NEW: "canary"}
    assert {tier.first.assign().revision for _ in range(1_000)} == {OLD}
    assert await stored_targets(redis_url) == [TARGET]
    operator = RolloutStore(redis_url, TARGET)
    stored = await operator.sync(0, {})
    assert stored is not None
    assert stored.rollout is not None
    assert await operator.replace(stored.version, stored.rollout.promote(NEW))
    assert not await operator.replace(stored.version, stored.rollout.promote(OLD)), "too late"
    await operator.close()
    await tier.exchange()
    assert tier.roles() == {OLD: "superseded", NEW: "current"}
    await tier.close()


async def test_the_canary_leaves(tier: Tier) -> None:
    del tier.replicas[NEW]
    await tier.exchange(num_times=100)
    assert tier.roles() == {OLD: "current", NEW: "waiting"}
    tier.replicas[NEW] = 1
    await tier.exchange()
    assert tier.roles() == {OLD: "current", NEW: "canary"}


async def test_the_canary_replaces_a_current_revision_that_is_gone(tier: Tier) -> None:
    """As after a rolling update of the only StatefulSet."""
    del tier.replicas[OLD]
    await tier.exchange(num_times=30)
    assert tier.roles() == {OLD: "current", NEW: "canary"}, "a replica may restart"
    await tier.exchange(num_times=40)
    assert tier.roles() == {OLD: "control", NEW: "current"}
    assert tier.num_decisions(REPLACED) == 1


async def test_a_third_revision_is_compared_after_the_second_is_promoted(tier: Tier) -> None:
    tier.replicas["third"] = 1
    await tier.exchange()
    assert tier.first.record.role("third") is Role.WAITING
    await tier.generate({OLD: 0.5, NEW: 0.7, "third": 0.7}, 200)
    assert tier.roles() == {OLD: "superseded", NEW: "current"}
    assert tier.first.record.role("third") is Role.CANARY


async def test_revisions_are_used_in_the_order_of_their_roles(tier: Tier) -> None:
    await tier.generate({OLD: 0.6, NEW: 0.1}, 200)
    assignment = tier.first.assign()
    ranks = [tier.first.rank(name, assignment) for name in (OLD, "unknown", NEW)]
    assert ranks == sorted(ranks), "a revision that was rolled back is better than none"
    assert len(set(ranks)) == 3


async def test_redis_that_lost_the_rollout_gets_it_again(tier: Tier, redis_url: str) -> None:
    await tier.generate({OLD: 0.6, NEW: 0.1}, 200)
    connection = RedisConnection(redis_url, timeout_s=10.0, preamble=())
    await connection.exchange([(b"FLUSHALL",)])
    await connection.close()
    later = tier.add()
    await tier.exchange()
    assert later.record == tier.first.record
    assert tier.roles()[NEW] == "rolled_back"


@pytest.mark.parametrize("record", [b"{", b'{"version": "x"}'])
async def test_a_record_that_cannot_be_read_is_left_alone(redis_url: str, record: bytes) -> None:
    connection = RedisConnection(redis_url, timeout_s=10.0, preamble=())
    key = b"outrider:draft_rollout:" + TARGET.encode()
    await connection.exchange([(b"HSET", key, b"version", b"7", b"rollout", record)])
    tier = Tier(redis_url, num_orchestrators=1)
    with capture_logs() as logs:
        await tier.begin()
    assert tier.first.record.version == 0
    assert [entry["event"] for entry in logs].count("draft_rollout_malformed") == 1
    assert await connection.exchange([(b"HGET", key, b"rollout")]) == [record]
    await connection.close()
    await tier.close()
