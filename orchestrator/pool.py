"""The replicas of one tier: a link to each, kept up, and which of them a generation goes to.

Sticky to where its keys and values lie, else to the least loaded. Replicas come and go while it
runs: a list that never changes, or whatever a registry tells. Knows neither tier's messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from typing import Any, Generic, TypeVar

from orchestrator.link import ReplicaLink
from outrider.costs import CostReport
from outrider.errors import Unavailable
from outrider.v1 import model_pb2

Link = TypeVar("Link", bound=ReplicaLink[Any, Any])


class ReplicaPool(Generic[Link]):
    """`make_link` gets an endpoint and what to call at each change. Lives on the event loop."""

    def __init__(
        self,
        tier: str,
        make_link: Callable[[str, Callable[[], None]], Link],
        endpoints: Iterable[str],
    ) -> None:
        self.tier = tier
        self.links: dict[str, Link] = {}
        # What the tier serves, as its first replica said; all have the same.
        self.model: model_pb2.ModelInfo | None = None
        self._make_link = make_link
        self._static = frozenset(endpoints)
        self._wanted = self._static
        self._changed = asyncio.Event()

    def offer(self, num_open: Mapping[str, int]) -> None:
        """The endpoints that the registry names, and how many generations each of them has.

        One that is named no more stays as long as its stream is up: it is the registry that may be
        away.
        """
        self._wanted = self._static | frozenset(num_open)
        for endpoint, num in num_open.items():
            if (link := self.links.get(endpoint)) is not None:
                link.num_others = max(0, num - (link.load - link.num_others))
        self._notify()

    @property
    def is_discovered(self) -> bool:
        """It has no list of its own: the registry tells."""
        return not self._static

    @property
    def has_any(self) -> bool:
        """Whether a generation can be opened now."""
        return any(link.takes_generations for link in self.links.values())

    @property
    def num_connected(self) -> int:
        return sum(link.is_connected for link in self.links.values())

    @property
    def costs(self) -> CostReport:
        """Of the replica that the next generation would go to: they are of one kind."""
        link = self.pick()
        return link.costs if link is not None else CostReport()

    def pick(self, preferred: str | None = None, avoid: Collection[str] = ()) -> Link | None:
        """Where a new generation goes; None where there is no replica but those to `avoid`."""
        open_links = [
            link
            for endpoint, link in self.links.items()
            if link.takes_generations and endpoint not in avoid
        ]
        if preferred is not None:
            for link in open_links:
                if link.endpoint == preferred:
                    return link
        return min(open_links, key=lambda link: link.load, default=None)

    async def acquire(self, timeout_s: float, preferred: str | None = None) -> Link:
        """As `pick`, waiting for a replica. Raises Unavailable."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (link := self.pick(preferred)) is None:
                    await self.change()
                return link
        known = ", ".join(sorted(self._wanted)) or "no address is known"
        raise Unavailable(f"no {self.tier} replica takes generations ({known})")

    async def settled(self) -> None:
        """Returns once a replica is connected; raises ConfigError where all were refused."""
        while not self.num_connected:
            refused = [link.refused for link in self.links.values()]
            reason = refused[0] if refused and all(refused) else None
            if reason is not None and self._wanted == self._static:
                raise reason
            await self.change()

    async def change(self) -> None:
        """Returns at the next change of any replica."""
        self._changed.clear()
        await self._changed.wait()

    def forget(self, session_id: str) -> None:
        """The session is deleted: what replicas keep of it may go."""
        for link in self.links.values():
            link.send(session_id)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps the links up for the time of a block."""
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self._run(), name=f"{self.tier} replicas")
            try:
                yield
            finally:
                task.cancel()

    async def _run(self) -> None:
        running: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                for endpoint in self._wanted - running.keys():
                    link = self.links[endpoint] = self._make_link(endpoint, self._notify)
                    running[endpoint] = tasks.create_task(link.run(), name=f"link {endpoint}")
                for endpoint in running.keys() - self._wanted:
                    if not self.links[endpoint].is_connected:
                        running.pop(endpoint).cancel()
                        del self.links[endpoint]
                await self.change()

    def _notify(self) -> None:
        if self.model is None:
            self.model = next(
                (link.model for link in self.links.values() if link.is_connected), None
            )
        self._changed.set()
