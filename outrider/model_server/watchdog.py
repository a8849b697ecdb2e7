"""Whether the device moves: an engine that says what it is at, and who watches that it goes on.

A pass that takes far longer than its like makes the replica stuck: traffic goes elsewhere until it
ends. What nothing cures but a new process ends this one. Knows neither streams nor probes.
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
from outrider.engine.interface import BlockScores, Logits
from outrider.errors import InternalError
from outrider.model_server.replica_status import ReplicaStatus
from outrider.replica import CostReport
from outrider.sampling.params import SamplingParams

log = structlog.get_logger()

LOOK_INTERVAL_S = 0.1
# However busy the machine: passes of ten times their usual time are seen, of a hundred not.
SLOWEST_RATIO = 10.0


class WatchedEngine:
    """The engine, telling the device thread of each pass and of what is drawn from it.

    What a pass takes may show only where its logits are read: on CUDA `forward` just asks for it.
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

    def sampler(self, params: SamplingParams, prompt_len: int, vocab_size: int) -> Sampler:
        return self._engine.sampler(params, prompt_len, vocab_size)

    def sample(
        self, asks: Sequence[SampleRequest], logits: Logits
    ) -> list[SampledToken | Exception]:
        self._note("draw")
        return self._engine.sample(asks, logits)

    def score(self, asks: Sequence[ScoreRequest], logits: Logits) -> list[BlockScores | Exception]:
        self._note("reply")
        return self._engine.score(asks, logits)

    def _note(self, part: str) -> None:
        self._device.note(part, self._num_rows, self._num_tokens)


class Watchdog:
    """Looks at the device thread; `run` is its only task, on the event loop.

    Begun when the model is loaded and its passes are measured: neither has a time to be held to.
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
        """Stuck is what lasts `stuck_after_s` and ten times what `costs` expect of such a pass."""
        self._device = device
        self._status = status
        self._costs = costs
        self._stuck_after_s = stuck_after_s
        self._exit_after_s = exit_after_s
        self._seen: Activity | None = None
        # How long the thread has been at what was seen last; and since when, where that is stuck.
        self._still_s = 0.0
        self._stuck_s: float | None = None

    async def run(self) -> None:
        """Ends by cancellation. Raises InternalError where it was stuck for `exit_after_s`."""
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            now = time.monotonic()
            # A process that was stopped as a whole (SIGSTOP, a suspended machine) is not stuck.
            self._look(min(now - looked_at, 5 * LOOK_INTERVAL_S))
            looked_at = now

    def _look(self, passed_s: float) -> None:
        activity = self._device.activity
        if activity is None or activity is not self._seen:
            self._moved()
            self._seen, self._still_s = activity, 0.0
            return
        self._still_s += passed_s
        if self._stuck_s is not None:
            self._stuck_s += passed_s
            if self._stuck_s > self._exit_after_s:
                raise InternalError(
                    f"the device is stuck: {activity.call} ({activity.part}) has not ended for "
                    f"{self._still_s:.1f} s"
                )
        elif self._still_s > self._limit_s(activity):
            self._got_stuck(activity)

    def _limit_s(self, activity: Activity) -> float:
        if not activity.num_rows:
            return self._stuck_after_s
        costs, num_tokens = self._costs(), activity.num_tokens
        # Beyond what was measured the curve may be steeper than its end: a slow model has been
        # timed with a few tokens, which cost it no more than one, and then reads a long prompt.
        most = costs.num_tokens[-1]
        pass_s = costs.pass_s(min(num_tokens, most), activity.num_rows) * max(1, num_tokens / most)
        return self._stuck_after_s + SLOWEST_RATIO * pass_s

    def _got_stuck(self, activity: Activity) -> None:
        self._stuck_s = 0.0
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

    def _moved(self) -> None:
        if self._stuck_s is None:
            return
        log.warning("replica_moves_again", stuck_s=round(self._stuck_s, 3))
        self._stuck_s = None
        self._status.set_stuck(False)
