"""Failure policy of a replica whose forward passes fail.

After MAX_FAILED_PASSES consecutive failures the replica leaves service and runs a self-test every
second. It returns to service after one that succeeds. After MAX_FAILED_SELF_TESTS failures the
process ends, so that its supervisor starts another one. A self-test without KV room counts as
neither and is repeated. Passes that never end are handled in `watchdog`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from outrider.engine import Append, DeviceThread, SampleRequest, ServedEngine
from outrider.errors import InternalError, KVFull, OutriderError
from outrider.model_server.replica_status import ReplicaStatus
from outrider.sampling.params import SamplingParams, Verification

log = structlog.get_logger()

# Consecutive passes. A single failure may be caused by the requests of that pass.
MAX_FAILED_PASSES = 3
MAX_FAILED_SELF_TESTS = 5
SELF_TEST_INTERVAL_S = 1.0
# Each in its own sequence: with some models a single token can give NaN.
_NUM_TESTED_TOKENS = 4


class PassHealth:
    """Counter of consecutive failed passes. Lives on the device thread."""

    def __init__(self) -> None:
        self._num_failed = 0
        # Called once, with the last error, when MAX_FAILED_PASSES have failed in a row.
        self.on_failing: Callable[[Exception], None] | None = None

    def observe(self, results: Sequence[object]) -> None:
        """Records the results of a pass. It failed if every result is an error of the device."""
        failures = [result for result in results if isinstance(result, Exception)]
        if len(failures) < len(results):
            self._num_failed = 0
        elif failures and all(_is_device_error(error) for error in failures):
            self._count_failure(failures[0])

    def observe_error(self, error: Exception) -> None:
        """Records a pass that raised an error."""
        if _is_device_error(error):
            self._count_failure(error)

    def reset(self) -> None:
        self._num_failed = 0

    def _count_failure(self, error: Exception) -> None:
        self._num_failed += 1
        if self._num_failed == MAX_FAILED_PASSES and self.on_failing is not None:
            self.on_failing(error)


def _is_device_error(error: Exception) -> bool:
    """Whether the error is neither a request's own fault nor a lack of KV room."""
    return isinstance(error, InternalError) or not isinstance(error, OutriderError)


def self_test(engine: ServedEngine) -> None:
    """Runs one short pass that no generation takes part in. Called on the device thread.

    Raises the error that makes the pass fail. Raises KVFull where there is no room for it: the pass
    was not run, and the device's health stays unknown.
    """
    size = engine.info.vocab_size
    params = SamplingParams(temperature=0)
    appends: list[Append] = []
    try:
        for number in range(_NUM_TESTED_TOKENS):
            token_ids = np.array([(2 * number + 1) * size // (2 * _NUM_TESTED_TOKENS)])
            appends.append(Append(engine.store.open(1), token_ids, 1))
        logits = engine.forward(appends)
        sampled = engine.sample(
            [_sample_request(engine, params, append) for append in appends], logits
        )
    finally:
        for append in appends:
            engine.store.free(append.sequence)
    errors = [result for result in sampled if isinstance(result, Exception)]
    if len(errors) == len(sampled):
        raise errors[0]


def _sample_request(engine: ServedEngine, params: SamplingParams, append: Append) -> SampleRequest:
    """A greedy sample after the appended token."""
    token_ids = np.asarray(append.token_ids)
    return SampleRequest(
        sampler=engine.sampler(params, 1, engine.info.vocab_size),
        history=lambda: token_ids,
        position=1,
        base_len=1,
        verification=Verification.REJECTION,
        is_guess=True,
    )


class Recovery:
    """Takes the replica out of service and back. `run` is its only task, on the event loop."""

    def __init__(
        self,
        device: DeviceThread,
        status: ReplicaStatus,
        health: PassHealth,
        self_test: Callable[[], None],
    ) -> None:
        """`self_test` runs a pass; called on the device thread, raises if the pass fails."""
        self._device = device
        self._status = status
        self._health = health
        self._self_test = self_test
        self._failing = asyncio.Event()
        self._last_error = ""
        self._loop = asyncio.get_running_loop()
        health.on_failing = self._schedule_failing

    def _schedule_failing(self, error: Exception) -> None:
        """Called on the device thread."""
        self._loop.call_soon_threadsafe(self._set_failing, error)

    def _set_failing(self, error: Exception) -> None:
        self._last_error = f"{type(error).__name__}: {error}"
        log.error("replica_failing", num_failed_passes=MAX_FAILED_PASSES, why=self._last_error)
        self._status.set_failing(True)
        self._failing.set()

    async def run(self) -> None:
        """Runs until cancelled. Raises InternalError after MAX_FAILED_SELF_TESTS failures."""
        while True:
            await self._failing.wait()
            await self._recover()
            self._failing.clear()
            self._status.set_failing(False)

    async def _recover(self) -> None:
        num_failed = 0
        while num_failed < MAX_FAILED_SELF_TESTS:
            await asyncio.sleep(SELF_TEST_INTERVAL_S)
            try:
                await self._device.run(self._test_device)
            except KVFull as error:  # not run: room is freed when generations end
                log.warning("self_test_without_room", why=str(error))
            except Exception as error:
                num_failed += 1
                self._last_error = f"{type(error).__name__}: {error}"
                log.warning("self_test_failed", number=num_failed, why=self._last_error)
            else:
                log.warning("replica_works_again", num_failed_self_tests=num_failed)
                return
        raise InternalError(
            f"the device fails: {MAX_FAILED_PASSES} consecutive passes and {MAX_FAILED_SELF_TESTS} "
            f"self-tests failed; last error: {self._last_error}"
        )

    def _test_device(self) -> None:
        """Self-test; resets the failure count if it succeeds. Called on the device thread."""
        self._self_test()
        self._health.reset()
