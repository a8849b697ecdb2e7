"""System under test: replicas of every tier and a Redis, with a relay on every link.

Owns the programs, the links between them and their removal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from outrider.cli.failures import require_engine
from outrider.cli.relay import Relay
from outrider.cli.stack import (
    draft_arguments,
    orchestrator_arguments,
    simulated_arguments,
    target_arguments,
)
from outrider.cli.stack_options import StackOptions
from outrider.errors import ConfigError, OutriderError
from outrider.redis.embedded import RedisServer
from outrider_bench.chaos.faults import Tier
from outrider_bench.chaos.nodes import Node

_HOST = "127.0.0.1"
# Time limit from a replica's start until every orchestrator has connected. Their back-off is at
# most 2 s.
_RECONNECT_TIMEOUT_S = 15.0
_POLL_S = 0.05


class Place(NamedTuple):
    """Tier and number of a process. Redis is replica 0 of its tier."""

    tier: Tier
    replica: int


class LinkPlace(NamedTuple):
    """A link from orchestrator `link` to a replica.

    For a link to an orchestrator, from its clients, `link` is 0.
    """

    tier: Tier
    replica: int
    link: int


@dataclass(frozen=True)
class Size:
    """Number of replicas of each model tier, and of orchestrators."""

    num_replicas: int = 2
    num_orchestrators: int = 2


class System:
    """Async context manager: serves on entering; leaves no process and no socket.

    `on_death` is called with the reason when a program exits although no fault stopped it. Entering
    and `__init__` raise ConfigError; entering also ProgramFailed. Use it on the event loop of the
    main thread (`outrider.runtime.child_process`).
    """

    def __init__(
        self, options: StackOptions, size: Size, log_dir: Path, on_death: Callable[[str], None]
    ) -> None:
        require_engine()
        self.size = size
        self.nodes: dict[Place, Node] = {}
        self.links: dict[LinkPlace, Relay] = {}
        self.redis = RedisServer(keeps_data=True)
        self._options = options
        self._log_dir = log_dir
        self._on_death = on_death
        self._resources = contextlib.AsyncExitStack()

    @property
    def endpoints(self) -> list[str]:
        """Addresses of the orchestrators' relays for clients; stable across restarts."""
        links = [self.links[LinkPlace(Tier.ORCHESTRATOR, i, 0)] for i in self._orchestrators]
        return [link.address for link in links]

    async def __aenter__(self) -> System:
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            self._resources.callback(self.redis.stop)
            self.redis.start()
            await self._make_links()
            self._make_nodes()
            models = [p for p in self.nodes if p.tier is not Tier.ORCHESTRATOR]
            await self._start_all(models)
            await self._start_all([p for p in self.nodes if p not in models])
            for place in models:
                await self.connected(place)
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._resources.aclose()

    @property
    def _orchestrators(self) -> range:
        return range(self.size.num_orchestrators)

    def link_at(self, address: str) -> LinkPlace | None:
        """Link whose relay has that host:port; None: no link."""
        return next((at for at, link in self.links.items() if link.address == address), None)

    def links_to(self, place: Place) -> list[Relay]:
        """Relays of all links to a process."""
        return [link for at, link in self.links.items() if (at.tier, at.replica) == place]

    async def connected(self, place: Place) -> bool:
        """Waits until every orchestrator has connected to the replica; False: timeout."""
        links = self.links_to(place)
        deadline = asyncio.get_running_loop().time() + _RECONNECT_TIMEOUT_S
        while not all(link.num_connected for link in links):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _make_links(self) -> None:
        path = self.redis.url.removeprefix("unix://")
        places = [LinkPlace(Tier.ORCHESTRATOR, i, 0) for i in self._orchestrators]
        for link in self._orchestrators:
            places.append(LinkPlace(Tier.REDIS, 0, link))
            for tier in (Tier.TARGET, Tier.DRAFT):
                places += [LinkPlace(tier, i, link) for i in range(self.size.num_replicas)]
        for place in places:
            # A replica's address is set when it serves (`Node.start`); nobody connects before.
            host = path if place.tier is Tier.REDIS else _HOST
            relay = Relay(_HOST, 0, host, 0, 0.0)
            self.links[place] = await self._resources.enter_async_context(relay)

    def _make_nodes(self) -> None:
        options = self._options
        arguments: dict[Place, list[str]] = {}
        for replica in range(self.size.num_replicas):
            arguments[Place(Tier.TARGET, replica)] = target_arguments(options)
            arguments[Place(Tier.DRAFT, replica)] = _draft_arguments(options)
        for place in arguments:
            # Step costs are measured while serving; a restart must not take seconds for it.
            arguments[place] += ["--calibration-s=0.2"]
        for number in self._orchestrators:
            arguments[Place(Tier.ORCHESTRATOR, number)] = orchestrator_arguments(
                options,
                self._addresses(Tier.TARGET, number),
                self._addresses(Tier.DRAFT, number),
                f"redis://{self._addresses(Tier.REDIS, number)}/0",
            )
        for place, given in arguments.items():
            name = f"{place.tier}{place.replica}"
            node = Node(name, given, self._log_dir, self.links_to(place), self._on_death)
            self.nodes[place] = node
            self._resources.push_async_callback(node.close)

    def _addresses(self, tier: Tier, link: int) -> str:
        """Addresses of a tier's replicas, as one orchestrator reaches them."""
        own = [relay for at, relay in self.links.items() if (at.tier, at.link) == (tier, link)]
        return ",".join(relay.address for relay in own)

    async def _start_all(self, places: list[Place]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for place in places:
                    tasks.create_task(self.nodes[place].start())
        except* OutriderError as group:
            raise group.exceptions[0] from None


def _draft_arguments(options: StackOptions) -> list[str]:
    if options.simulate_draft is not None:
        return simulated_arguments(options, "draft_service", options.simulate_draft)
    if options.draft_model is None:
        raise ConfigError("--draft: is required; the faults include the draft tier")
    return draft_arguments(options, options.draft_model)
