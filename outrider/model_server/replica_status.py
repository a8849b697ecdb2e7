"""The one owner of a replica's state: what probes, the registry and every stream are told.

Knows nothing of how it is told. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from outrider.replica import ReplicaState

# Is called on the event loop, must neither block nor raise.
Follower = Callable[[ReplicaState], None]


class ReplicaStatus:
    """starting → ready → draining; stuck or failing while the device is, whatever else holds."""

    def __init__(self) -> None:
        self._is_serving = self._is_draining = self._is_stuck = self._is_failing = False
        self._told = ReplicaState.STARTING
        self._followers: list[Follower] = []
        self._changed = asyncio.Event()

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
        """From now on generations are taken."""
        self._is_serving = True
        self._tell()

    def drain(self) -> None:
        """From now on no new ones; for ever."""
        self._is_draining = True
        self._tell()

    def set_stuck(self, is_stuck: bool) -> None:
        self._is_stuck = is_stuck
        self._tell()

    def set_failing(self, is_failing: bool) -> None:
        self._is_failing = is_failing
        self._tell()

    async def change(self) -> None:
        """Returns after the next change; who has awaited something else looks at `state` first."""
        self._changed.clear()
        await self._changed.wait()

    @property
    def has_followers(self) -> bool:
        return bool(self._followers)

    @contextlib.contextmanager
    def followed_by(self, follower: Follower) -> Iterator[None]:
        """Told the state at once, then each change in the instant it happens."""
        self._followers.append(follower)
        try:
            follower(self.state)
            yield
        finally:
            self._followers.remove(follower)

    def _tell(self) -> None:
        if self.state is self._told:
            return
        self._told = self.state
        self._changed.set()
        for follower in tuple(self._followers):
            follower(self._told)
