"""A run against a system of our own: who is hit by a fault, and what is left when all is over.

Puts `System`, `Injector` and `Run` together. Knows no terminal.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from outrider.cli.stack_options import StackOptions
from outrider_bench.chaos.audit import still_open
from outrider_bench.chaos.client import Stream
from outrider_bench.chaos.faults import PROCESS_KINDS, Fault, Tier, schedule
from outrider_bench.chaos.inject import Injector
from outrider_bench.chaos.nodes import Node
from outrider_bench.chaos.run import Findings, Load, Progress, Run
from outrider_bench.chaos.system import LinkPlace, Size, System
from outrider_bench.measuring.tiers import draft_info, target_info


@dataclass(frozen=True)
class Disturbance:
    """Which sorts of faults, how often, how long at most; `is_once`: each of them once only."""

    names: tuple[str, ...]
    gap_s: float
    longest_s: float
    is_once: bool = False


async def run_on_own(
    load: Load,
    disturbance: Disturbance,
    options: StackOptions,
    log_dir: Path,
    progress: Progress,
    findings: Findings,
) -> None:
    """Starts a system, disturbs it under load, judges, and leaves nothing of it but logs.

    Adds to `findings`, also where it is cancelled.

    For the event loop of the main thread. Raises ConfigError, ProgramFailed, Unavailable.
    """
    deaths: list[str] = []
    progress("start", 0, 1)
    async with System(options, Size(), log_dir, deaths.append) as system:
        run = Run(load, system.endpoints, progress, findings)

        async def find_streams(fault: Fault) -> Sequence[Stream]:
            return await _streams_on(fault, run, system)

        injector = Injector(system, find_streams, run.findings.problems.append)
        faults = schedule(
            load.seed,
            disturbance.names,
            num_replicas=system.size.num_replicas,
            num_orchestrators=system.size.num_orchestrators,
            gap_s=disturbance.gap_s,
            longest_s=disturbance.longest_s,
        )
        num_sorts = len(disturbance.names)
        if disturbance.is_once:
            faults = itertools.islice(faults, num_sorts)
        try:
            await run.run(injector, faults, num_sorts)
        finally:
            findings.problems += [f"{death} (by itself)" for death in deaths]
        run.findings.problems += await _left_open(system)


async def _streams_on(fault: Fault, run: Run, system: System) -> Sequence[Stream]:
    """Those that run on the fault's place now."""
    running, is_process = run.running, fault.kind in PROCESS_KINDS
    if fault.tier is Tier.REDIS:
        return [s for s in running if is_process or s.orchestrator == fault.link]
    if fault.tier is Tier.ORCHESTRATOR:
        return [s for s in running if s.orchestrator == fault.replica]
    sessions = await asyncio.gather(*(run.session(stream) for stream in running))
    found = []
    for stream, session in zip(running, sessions, strict=True):
        if session is None:
            continue
        kv = session.target_kv if fault.tier is Tier.TARGET else session.draft_kv
        place = system.link_at(kv.replica)
        here = LinkPlace(fault.tier, fault.replica, fault.link)
        if place == here or (is_process and place is not None and place[:2] == here[:2]):
            found.append(stream)
    return found


async def _left_open(system: System) -> list[str]:
    """Generations that a replica still has when every caller is gone."""
    nodes = [node for place, node in system.nodes.items() if place.tier is Tier.TARGET]
    drafts = [node for place, node in system.nodes.items() if place.tier is Tier.DRAFT]
    loads: list[Callable[[], Awaitable[Any]]] = [partial(_load, target_info, n) for n in nodes]
    loads += [partial(_load, draft_info, node) for node in drafts]
    try:
        counts = await still_open(loads)
    except grpc.aio.AioRpcError as error:
        return [f"a replica cannot be asked what it holds: {error.code().name}"]
    return [
        f"{node.name} still has {count} generations open"
        for node, count in zip([*nodes, *drafts], counts, strict=True)
        if count
    ]


async def _load(info: Callable[[str], Awaitable[Any]], node: Node) -> Any:
    return (await info(node.address)).load
