"""State of a replica: the single source for health probes, the registry and every stream.

For use on the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from outrider.replica import ReplicaState

# Called on the event loop; must neither block nor raise.
StateListener = Callable[[ReplicaState], None]


class ReplicaStatus:
    """starting → ready → draining. Stuck and failing take precedence over these."""

    def __init__(self) -> None:
        self._is_serving = self._is_draining = self._is_stuck = self._is_failing = False
        self._published = ReplicaState.STARTING
        self._listeners: list[StateListener] = []
        self._change = asyncio.Event()

    @property
    def state(self) -> ReplicaState:
        if self._is_stuck:
            return ReplicaState.STUCK
        if self._is_failing:
            return ReplicaState.FAILING
        if self._is_draining:
            return ReplicaState.DRAINING
        return ReplicaState.READY if self._is_serving else ReplicaState.STARTING

    def serve(self) -> None:
        """Accepts generations from now on."""
        self._is_serving = True
        self._publish()

    def drain(self) -> None:
        """Accepts no new generations from now on. Cannot be undone."""
        self._is_draining = True
        self._publish()

    def set_stuck(self, is_stuck: bool) -> None:
        self._is_stuck = is_stuck
        self._publish()

    def set_failing(self, is_failing: bool) -> None:
        self._is_failing = is_failing
        self._publish()

    async def changed(self) -> None:
        """Returns after the next change. Check `state` first if anything else was awaited."""
        self._change.clear()
        await self._change.wait()

    @property
    def has_listeners(self) -> bool:
        return bool(self._listeners)

    @contextlib.contextmanager
    def listened_by(self, listener: StateListener) -> Iterator[None]:
        """Calls the listener with the state at once, then immediately at each change."""
        self._listeners.append(listener)
        try:
            listener(self.state)
            yield
        finally:
            self._listeners.remove(listener)

    def _publish(self) -> None:
        if self.state is self._published:
            return
        self._published = self.state
        self._change.set()
        for listener in tuple(self._listeners):
            listener(self._published)
