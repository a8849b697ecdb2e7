"""Watchdog of the device thread, and an engine wrapper that reports what the device is doing.

A pass that takes far longer than expected makes the replica *stuck*: it gets no traffic until the
pass ends. If it stays stuck too long, the process exits, because only a restart can help.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from outrider.engine import (
    Append,
    DeviceThread,
    SampledToken,
    Sampler,
    SampleRequest,
    ScoreRequest,
    ServedEngine,
)
from outrider.engine.device_thread import Activity
from outrider.engine.interface import BlockScores, Ids, Logits, PromptRequest, PromptScores
from outrider.errors import InternalError
from outrider.model_server.replica_status import ReplicaStatus
from outrider.replica import CostReport
from outrider.sampling.params import SamplingParams

log = structlog.get_logger()

CHECK_INTERVAL_S = 0.1
# On a busy machine passes of ten times their usual duration were seen, of a hundred times never.
SLOWEST_RATIO = 10.0


class WatchedEngine:
    """Engine wrapper that notes each pass and each sampling step at the device thread.

    On CUDA `forward` only enqueues the pass; a slow pass shows where its logits are read.
    """

    def __init__(self, engine: ServedEngine, device: DeviceThread) -> None:
        self._engine = engine
        self._device = device
        self._num_rows = self._num_tokens = 0
        self.store = engine.store
        self.info = engine.info

    def forward(self, appends: Sequence[Append]) -> Logits:
        self._num_rows = len(appends)
        self._num_tokens = sum(len(append.token_ids) for append in appends)
        self._note("forward")
        return self._engine.forward(appends)

    def sampler(
        self,
        params: SamplingParams,
        prompt_len: int,
        vocab_size: int,
        forbidden_ids: Ids | None = None,
    ) -> Sampler:
        return self._engine.sampler(params, prompt_len, vocab_size, forbidden_ids)

    def sample(
        self, asks: Sequence[SampleRequest], logits: Logits
    ) -> list[SampledToken | Exception]:
        self._note("draw")
        return self._engine.sample(asks, logits)

    def score(self, asks: Sequence[ScoreRequest], logits: Logits) -> list[BlockScores | Exception]:
        self._note("reply")
        return self._engine.score(asks, logits)

    def score_prompts(
        self, asks: Sequence[PromptRequest], logits: Logits
    ) -> list[PromptScores | Exception]:
        self._note("reply")
        return self._engine.score_prompts(asks, logits)

    def _note(self, part: str) -> None:
        self._device.note(part, self._num_rows, self._num_tokens)


class Watchdog:
    """Watches the device thread. `run` is its only task, on the event loop.

    Start it after loading and calibration: neither has a time limit.
    """

    def __init__(
        self,
        device: DeviceThread,
        status: ReplicaStatus,
        costs: Callable[[], CostReport],
        *,
        stuck_after_s: float,
        exit_after_s: float,
    ) -> None:
        """Stuck: longer than `stuck_after_s` plus ten times the duration expected by `costs`."""
        self._device = device
        self._status = status
        self._costs = costs
        self._stuck_after_s = stuck_after_s
        self._exit_after_s = exit_after_s
        self._seen: Activity | None = None
        # Time spent in the last seen activity, and since it was found stuck.
        self._activity_s = 0.0
        self._stuck_for_s: float | None = None

    async def run(self) -> None:
        """Runs until cancelled. Raises InternalError after `exit_after_s` of being stuck."""
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            now = time.monotonic()
            # Clamped: a process stopped as a whole (SIGSTOP, suspended machine) is not stuck.
            self._check(min(now - checked_at, 5 * CHECK_INTERVAL_S))
            checked_at = now

    def _check(self, elapsed_s: float) -> None:
        activity = self._device.activity
        if activity is None or activity is not self._seen:
            self._clear_stuck()
            self._seen, self._activity_s = activity, 0.0
            return
        self._activity_s += elapsed_s
        if self._stuck_for_s is not None:
            self._stuck_for_s += elapsed_s
            if self._stuck_for_s > self._exit_after_s:
                raise InternalError(
                    f"the device is stuck: {activity.call} ({activity.part}) has not ended for "
                    f"{self._activity_s:.1f} s"
                )
        elif self._activity_s > self._limit_s(activity):
            self._set_stuck(activity)

    def _limit_s(self, activity: Activity) -> float:
        if not activity.num_rows:
            return self._stuck_after_s
        costs, num_tokens = self._costs(), activity.num_tokens
        # Scaled linearly beyond the last measured point. A slow model was measured with few tokens,
        # which cost no more than one, and may then read a long prompt.
        max_measured = costs.num_tokens[-1]
        pass_s = costs.pass_s(min(num_tokens, max_measured), activity.num_rows) * max(
            1, num_tokens / max_measured
        )
        return self._stuck_after_s + SLOWEST_RATIO * pass_s

    def _set_stuck(self, activity: Activity) -> None:
        self._stuck_for_s = 0.0
        log.error(
            "replica_stuck",
            call=activity.call,
            part=activity.part,
            for_s=round(time.monotonic() - activity.since, 3),
            num_rows=activity.num_rows,
            num_tokens=activity.num_tokens,
            stack=self._device.stack(),
        )
        self._status.set_stuck(True)

    def _clear_stuck(self) -> None:
        if self._stuck_for_s is None:
            return
        log.warning("replica_moves_again", stuck_s=round(self._stuck_for_s, 3))
        self._stuck_for_s = None
        self._status.set_stuck(False)
