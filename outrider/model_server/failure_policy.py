"""Whether the device's passes succeed: who counts those that fail, and what is done about it.

A replica whose passes fail one after another leaves service, tries a pass of its own every second,
and returns after one that succeeds. After several that fail the process ends, so that whatever
supervises it starts another one. A self-test that finds no KV room is neither: it is repeated. A
pass that does not end at all is `progress`' matter.
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

# Consecutive passes; one that fails alone may be the fault of its rows.
MAX_FAILED_PASSES = 3
MAX_FAILED_SELF_TESTS = 5
SELF_TEST_INTERVAL_S = 1.0
# Each in a sequence of its own: a model may have tokens that alone give NaN.
_NUM_TESTED_TOKENS = 4


class PassHealth:
    """Counts consecutive failed passes. Lives on the device thread."""

    def __init__(self) -> None:
        self._num_failed = 0
        # Called once, with the last error, when too many have failed in a row.
        self.on_failing: Callable[[Exception], None] | None = None

    def observe(self, answers: Sequence[object]) -> None:
        """A pass gave these answers: it failed if each of them is an error of the device."""
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if len(failures) < len(answers):
            self._num_failed = 0
        elif failures and all(_is_of_device(error) for error in failures):
            self._failed(failures[0])

    def observe_error(self, error: Exception) -> None:
        """A pass ended with an error."""
        if _is_of_device(error):
            self._failed(error)

    def reset(self) -> None:
        self._num_failed = 0

    def _failed(self, error: Exception) -> None:
        self._num_failed += 1
        if self._num_failed == MAX_FAILED_PASSES and self.on_failing is not None:
            self.on_failing(error)


def _is_of_device(error: Exception) -> bool:
    """Not a request's own fault, and no want of room."""
    return isinstance(error, InternalError) or not isinstance(error, OutriderError)


def self_test(engine: ServedEngine) -> None:
    """One short pass that no generation is in; on the device thread. Raises what makes it fail.

    Raises KVFull where there is no room for it: it was not run, and says nothing of the device.
    """
    size = engine.info.vocab_size
    params = SamplingParams(temperature=0)
    appends: list[Append] = []
    try:
        for number in range(_NUM_TESTED_TOKENS):
            token_ids = np.array([(2 * number + 1) * size // (2 * _NUM_TESTED_TOKENS)])
            appends.append(Append(engine.store.open(1), token_ids, 1))
        logits = engine.forward(appends)
        sampled = engine.sample([_ask(engine, params, append) for append in appends], logits)
    finally:
        for append in appends:
            engine.store.free(append.sequence)
    errors = [answer for answer in sampled if isinstance(answer, Exception)]
    if len(errors) == len(sampled):
        raise errors[0]


def _ask(engine: ServedEngine, params: SamplingParams, append: Append) -> SampleRequest:
    """A greedy draw after the one token."""
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
    """Takes the replica out of service and back; `run` is its only task, on the event loop."""

    def __init__(
        self,
        device: DeviceThread,
        status: ReplicaStatus,
        health: PassHealth,
        self_test: Callable[[], None],
    ) -> None:
        """`self_test`: a pass, called on the device thread; raises where it fails."""
        self._device = device
        self._status = status
        self._health = health
        self._self_test = self_test
        self._failing = asyncio.Event()
        self._why = ""
        self._loop = asyncio.get_running_loop()
        health.on_failing = self._tell

    def _tell(self, error: Exception) -> None:
        """On the device thread."""
        self._loop.call_soon_threadsafe(self._begin, error)

    def _begin(self, error: Exception) -> None:
        self._why = f"{type(error).__name__}: {error}"
        log.error("replica_failing", num_failed_passes=MAX_FAILED_PASSES, why=self._why)
        self._status.set_failing(True)
        self._failing.set()

    async def run(self) -> None:
        """Ends by cancellation. Raises InternalError where the self-tests fail."""
        while True:
            await self._failing.wait()
            await self._recovered()
            self._failing.clear()
            self._status.set_failing(False)

    async def _recovered(self) -> None:
        num_failed = 0
        while num_failed < MAX_FAILED_SELF_TESTS:
            await asyncio.sleep(SELF_TEST_INTERVAL_S)
            try:
                await self._device.run(self._tested)
            except KVFull as error:  # not run: there is room when generations have ended
                log.warning("self_test_without_room", why=str(error))
            except Exception as error:
                num_failed += 1
                self._why = f"{type(error).__name__}: {error}"
                log.warning("self_test_failed", number=num_failed, why=self._why)
            else:
                log.warning("replica_works_again", num_failed_self_tests=num_failed)
                return
        raise InternalError(
            f"the device fails: {MAX_FAILED_PASSES} passes and {MAX_FAILED_SELF_TESTS} self-tests "
            f"in a row; last: {self._why}"
        )

    def _tested(self) -> None:
        """On the device thread: what fails after it counts anew."""
        self._self_test()
        self._health.reset()
