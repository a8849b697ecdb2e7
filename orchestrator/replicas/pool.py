"""Replica pool of one tier: a link to each replica, and routing of generations.

A generation goes to the replica that has its keys and values, otherwise to the least loaded one.
The replicas are a fixed list, or those in the registry, which may change at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from orchestrator.replicas.replica_stream import ReplicaLink
from outrider.errors import Unavailable
from outrider.replica import CostReport
from outrider.v1 import model_pb2

Link = TypeVar("Link", bound=ReplicaLink[Any, Any])

# A replaced link stays open this long after its last generation, to send pending messages.
LINGER_S = 1.0


class ReplicaPool(Generic[Link]):
    """Pool of one tier. Runs on the event loop.

    `make_link` takes an endpoint and a function to call at each change.
    """

    def __init__(
        self,
        tier: str,
        make_link: Callable[[str, Callable[[], None]], Link],
        endpoints: Iterable[str],
    ) -> None:
        self.tier = tier
        self.links: dict[str, Link] = {}
        # Common model of the connected replicas; the last one if none is connected.
        self.model: model_pb2.ModelInfo | None = None
        self.max_len = 0
        self._make_link = make_link
        self._static = frozenset(endpoints)
        self._wanted = self._static
        # Endpoints whose link must be replaced, and links that will replace theirs when connected.
        self._outdated: set[str] = set()
        self._successors: dict[str, Link] = {}
        # All running links, including replaced ones, and since when those have been unused.
        self._tasks: dict[Link, asyncio.Task[None]] = {}
        self._unused_since: dict[Link, float] = {}
        self._changed = asyncio.Event()

    def offer(self, num_open: Mapping[str, int]) -> None:
        """Set the endpoints in the registry, with the number of open generations of each.

        An endpoint that is missing now stays while its stream is connected: the registry may be
        wrong.
        """
        self._wanted = self._static | frozenset(num_open)
        for endpoint, num in num_open.items():
            if (link := self.links.get(endpoint)) is not None:
                link.num_others = max(0, num - (link.load - link.num_others))
        self._notify()

    def renew(self) -> None:
        """Replace every link, because the credentials have changed.

        The old link takes no more generations once the new one is connected, and ends after its
        last generation. Until then the old one stays in use.
        """
        self._outdated |= self.links.keys()
        self._notify()

    @property
    def is_discovered(self) -> bool:
        """Whether the registry lists the replicas, not the settings."""
        return not self._static

    @property
    def has_any(self) -> bool:
        """Whether a generation can be opened now."""
        return any(link.takes_generations for link in self.links.values())

    @property
    def num_connected(self) -> int:
        return sum(link.is_connected for link in self.links.values())

    @property
    def models(self) -> list[model_pb2.ModelInfo]:
        """Models of the connected replicas."""
        links = (link for link in self.links.values() if link.is_connected)
        return [link.model for link in links if link.model is not None]

    def costs_of(self, endpoint: str | None) -> CostReport:
        """Last cost report of the replica at `endpoint`; of any other one if it is gone."""
        link = self.links.get(endpoint or "")
        if link is None:
            link = next((link for link in self.links.values() if link.takes_generations), None)
        return link.costs if link is not None else CostReport()

    def pick(
        self,
        preferred: str | None = None,
        avoid: Collection[str] = (),
        max_len: int = 0,
        rank: Callable[[Link], int] | None = None,
    ) -> Link | None:
        """The replica for a new generation of at most `max_len` tokens.

        `preferred` if it takes generations, otherwise the least loaded one, of several a random
        one. A replica with an open circuit is used only without any other, then one of a higher
        `rank` only without one of a lower. None if the generation fits no replica outside `avoid`.
        """
        open_links = [
            link
            for endpoint, link in self.links.items()
            if link.takes_generations and endpoint not in avoid and max_len <= link.max_len
        ]
        open_links = [link for link in open_links if link.breaker.allows] or open_links
        if rank is not None and open_links:
            ranks = [rank(link) for link in open_links]
            lowest = min(ranks)
            open_links = [link for link, r in zip(open_links, ranks, strict=True) if r == lowest]
        if preferred is not None:
            for link in open_links:
                if link.endpoint == preferred:
                    return link
        # Random among equals. Otherwise all orchestrators would choose the same replica.
        random.shuffle(open_links)
        return min(open_links, key=lambda link: link.load, default=None)

    def candidates(self, max_len: int = 0) -> frozenset[str]:
        """Replicas that take generations and have memory for one of `max_len` tokens.

        Those with an open circuit only if there are no others.
        """
        links = [
            link
            for link in self.links.values()
            if link.takes_generations and max_len <= link.max_len
        ]
        allowed = [link for link in links if link.breaker.allows] or links
        return frozenset(link.endpoint for link in allowed)

    async def acquire(
        self, timeout_s: float, preferred: str | None = None, max_len: int = 0
    ) -> Link:
        """As `pick`, but waits for a replica. Raises Unavailable after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (link := self.pick(preferred, max_len=max_len)) is None:
                    await self.change()
                return link
        known = ", ".join(sorted(self._wanted)) or "no address known"
        size = f" of {max_len} tokens" if max_len and self.has_any else ""
        raise Unavailable(f"no {self.tier} replica takes generations{size}", known)

    async def settled(self) -> None:
        """Wait until a replica is connected. Raises ConfigError if all of the list are refused."""
        while not self.num_connected:
            refused = [link.refusal.error for link in self.links.values()]
            reason = refused[0] if refused and all(refused) else None
            if reason is not None and self._wanted == self._static:
                raise reason
            await self.change()

    async def change(self) -> None:
        """Wait for the next change of any replica."""
        self._changed.clear()
        await self._changed.wait()

    def forget(self, session_id: str) -> None:
        """Tell all replicas that a session was deleted, so that they release its KV."""
        for link in self.links.values():
            link.send(session_id)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the links inside a `with` block."""
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self._run(), name=f"{self.tier} replicas")
            try:
                yield
            finally:
                task.cancel()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                for endpoint in self._wanted - self.links.keys():
                    self.links[endpoint] = self._start(endpoint, tasks)
                for endpoint in self.links.keys() - self._wanted:
                    if not self.links[endpoint].is_connected:
                        self._tasks.pop(self.links.pop(endpoint)).cancel()
                self._replace_outdated(tasks)
                has_former = self._end_former()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S if has_former else None):
                        await self.change()

    def _start(self, endpoint: str, tasks: asyncio.TaskGroup) -> Link:
        link = self._make_link(endpoint, self._notify)
        self._tasks[link] = tasks.create_task(link.run(), name=f"link {endpoint}")
        return link

    def _replace_outdated(self, tasks: asyncio.TaskGroup) -> None:
        for endpoint in self._outdated & self.links.keys():
            self._successors[endpoint] = self._start(endpoint, tasks)
        self._outdated.clear()
        for endpoint, link in list(self._successors.items()):
            former = self.links.get(endpoint)
            if former is None:
                del self._successors[endpoint]
            elif link.is_connected or not former.is_connected:
                self.links[endpoint] = self._successors.pop(endpoint)

    def _end_former(self) -> bool:
        """Ends replaced links that are unused. Returns whether others are still in use."""
        needed = {*self.links.values(), *self._successors.values()}
        former = [link for link in self._tasks if link not in needed]
        now = time.monotonic()
        for link in former:
            if link.is_connected and not link.is_idle:
                self._unused_since.pop(link, None)
            elif now - self._unused_since.setdefault(link, now) >= LINGER_S:
                del self._unused_since[link]
                self._tasks.pop(link).cancel()
        return any(link in self._tasks for link in former)

    def _notify(self) -> None:
        if models := self.models:
            self.model = pooled_model(models)
            self.max_len = max(link.max_len for link in self.links.values() if link.is_connected)
        self._changed.set()


def pooled_model(models: Sequence[model_pb2.ModelInfo]) -> model_pb2.ModelInfo:
    """One description of several replicas.

    The smallest max_gamma, because every replica must accept it. The longest context and the most
    memory, because a generation goes to a replica that it fits.
    """
    pooled = model_pb2.ModelInfo()
    pooled.CopyFrom(models[0])
    pooled.max_gamma = min(model.max_gamma for model in models)
    pooled.max_context_len = max(model.max_context_len for model in models)
    pooled.kv_capacity_tokens = max(model.kv_capacity_tokens for model in models)
    return pooled
