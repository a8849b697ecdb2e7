"""A verify request whose replica is lost: sent again, and after three losses in a row no more.

The request itself may kill the replicas: without a limit it would kill all of them, again and
again. Passes of a simulated target wait at a position, so that a request is certain to be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

import outrider.model_server.lifecycle
from orchestrator.generation.target_session import MAX_LOST_REPLICAS
from outrider.cli.relay import Relay
from outrider.engine import Append
from outrider.engine.simulated import SimulatedEngine
from outrider.settings.services import ModelServiceConfig
from outrider.settings.simulation import Simulation
from outrider.v1 import orchestrator_pb2
from tests.services.parts import GREEDY, System, Tiers, orchestrating, refusal
from tests.services.replicas import PROMPT, TIMEOUT_S, tier
from tests.stack import Output, eventually, request

NUM_TOKENS = 60
HOW: dict[str, Any] = {"sampling": {**GREEDY, "max_tokens": NUM_TOKENS}, "gamma": 0}


class Hold:
    """Passes that reach this many tokens of a sequence wait until it is moved; None: none does."""

    def __init__(self) -> None:
        self._at: int | None = None
        self._changed = threading.Condition()
        self._is_reached = False

    def move(self, at: int | None) -> None:
        with self._changed:
            self._at, self._is_reached = at, False
            self._changed.notify_all()

    async def is_reached(self) -> bool:
        return self._is_reached

    def _is_due(self, appends: Sequence[Append]) -> bool:
        longest = max((a.sequence.length + len(a.token_ids) for a in appends), default=0)
        self._is_reached = self._at is not None and longest >= self._at
        return self._is_reached

    def engine(self, config: ModelServiceConfig) -> SimulatedEngine:
        hold = self

        class Held(SimulatedEngine):
            def forward(self, appends: Sequence[Append]) -> None:
                with hold._changed:
                    assert hold._changed.wait_for(
                        lambda: not hold._is_due(appends), timeout=2 * TIMEOUT_S
                    )
                super().forward(appends)

        return Held(Simulation.parse(config.simulate or ""), config.kv_cache_tokens)


class Place:
    """An orchestrator whose link to its only target leads through a relay."""

    def __init__(self, system: System, relay: Relay, hold: Hold, logs: list[Any]) -> None:
        self.system, self.hold = system, hold
        self._relay, self._logs = relay, logs

    async def is_sent_again(self, num: int) -> None:
        async def is_it() -> bool:
            return sum(entry["event"] == "target_moved" for entry in self._logs) == num

        await eventually(is_it)

    async def lose(self, num_before: int, num: int) -> None:
        """The link breaks so often, each time with the same verify request under way."""
        await eventually(self.hold.is_reached)
        for number in range(num):
            await self.is_sent_again(num_before + number)
            self._relay.reset()


@contextlib.asynccontextmanager
async def placed(redis_url: str, **settings: Any) -> AsyncIterator[Place]:
    hold = Hold()
    load = outrider.model_server.lifecycle.load_served_engine
    with capture_logs() as logs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            outrider.model_server.lifecycle,
            "load_served_engine",
            lambda config: load(config)._replace(engine=hold.engine(config)),
        )
        async with (
            tier() as target,
            Relay("127.0.0.1", 0, "127.0.0.1", target.server.port, 0.0) as relay,
            orchestrating(
                Tiers(target.server, None),
                redis_url,
                target_endpoint=relay.address,
                target_wait_s=60.0,
                **settings,
            ) as system,
        ):
            try:
                yield Place(system, relay, hold, logs)
            finally:
                hold.move(None)


async def test_a_request_that_every_replica_is_lost_at_ends(redis_url: str) -> None:
    """By name; what was shown is recorded, and the session can be resumed."""
    async with placed(redis_url) as place:
        whole = await place.system.generate(PROMPT, **HOW)
        place.hold.move(len(PROMPT) + 20)
        asked = request(PROMPT, session_id="s", create_session=True, **HOW)
        output = Output()

        async def read(asked: orchestrator_pb2.GenerateRequest) -> None:
            async for chunk in place.system.client.Generate(asked, timeout=200):
                output.add(chunk)

        reading = asyncio.create_task(read(asked))
        await place.lose(0, MAX_LOST_REPLICAS)
        refused = await refusal(asyncio.wait_for(reading, TIMEOUT_S))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert f"lost {MAX_LOST_REPLICAS} times in a row" in refused.message
        assert "verify request" in refused.message
        assert len(output.token_ids) == 20, "what was committed is shown"
        place.hold.move(None)
        await read(orchestrator_pb2.GenerateRequest(session_id="s", resume_from=20))
        assert output.token_ids == whole.token_ids


async def test_progress_starts_the_count_anew(redis_url: str) -> None:
    """A long generation outlives any number of losses that it gets over."""
    async with placed(redis_url) as place:
        whole = await place.system.generate(PROMPT, **HOW)
        place.hold.move(len(PROMPT) + 10)
        running = asyncio.create_task(place.system.generate(PROMPT, **HOW))
        num_before = 0
        for position in (25, 40, None):
            await place.lose(num_before, MAX_LOST_REPLICAS - 1)
            num_before += MAX_LOST_REPLICAS - 1
            await place.is_sent_again(num_before)
            place.hold.move(None if position is None else len(PROMPT) + position)
        assert (await running).token_ids == whole.token_ids


@pytest.mark.slow
async def test_a_request_that_no_replica_answers_ends(redis_url: str) -> None:
    """The replica is there, and sends heartbeats: each time it is asked again."""
    async with placed(redis_url, verify_timeout_s=2.0) as place:
        how = {"sampling": {**GREEDY, "max_tokens": 1}, "gamma": 0}
        place.hold.move(1)
        refused = await refusal(asyncio.wait_for(place.system.generate(PROMPT, **how), TIMEOUT_S))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert f"lost {MAX_LOST_REPLICAS} times in a row" in refused.message
        place.hold.move(None)
        assert len((await place.system.generate(PROMPT, **how)).token_ids) == 1
