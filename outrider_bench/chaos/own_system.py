"""A run on a system of its own: finds the streams that a fault affects, and what is left open.

Puts `System`, `FaultInjector` and `ChaosRun` together.
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
from outrider_bench.chaos.audit import open_generation_counts
from outrider_bench.chaos.client import Stream
from outrider_bench.chaos.faults import PROCESS_KINDS, Fault, Tier, schedule
from outrider_bench.chaos.inject import FaultInjector
from outrider_bench.chaos.nodes import Node
from outrider_bench.chaos.run import ChaosRun, Findings, LoadSettings, Progress
from outrider_bench.chaos.system import LinkPlace, Size, System
from outrider_bench.measuring.tiers import draft_info, target_info


@dataclass(frozen=True)
class FaultPlan:
    """Names of the faults, mean gap and longest duration. `is_once`: each name occurs only once."""

    names: tuple[str, ...]
    gap_s: float
    longest_s: float
    is_once: bool = False


async def run_on_own_system(
    load: LoadSettings,
    plan: FaultPlan,
    options: StackOptions,
    log_dir: Path,
    progress: Progress,
    findings: Findings,
) -> None:
    """Starts a system, injects faults under load, audits. Leaves nothing of the system but logs.

    Adds to `findings`, even if cancelled. Call it on the event loop of the main thread. Raises
    ConfigError, ProgramFailed, Unavailable.
    """
    deaths: list[str] = []
    progress("start", 0, 1)
    async with System(options, Size(), log_dir, deaths.append) as system:
        run = ChaosRun(load, system.endpoints, progress, findings)

        async def find_streams(fault: Fault) -> Sequence[Stream]:
            return await _streams_on(fault, run, system)

        injector = FaultInjector(system, find_streams, run.findings.problems.append)
        faults = schedule(
            load.seed,
            plan.names,
            num_replicas=system.size.num_replicas,
            num_orchestrators=system.size.num_orchestrators,
            gap_s=plan.gap_s,
            longest_s=plan.longest_s,
        )
        num_fault_types = len(plan.names)
        if plan.is_once:
            faults = itertools.islice(faults, num_fault_types)
        try:
            await run.run(injector, faults, num_fault_types)
        finally:
            findings.problems += [f"{death} (not by a fault)" for death in deaths]
        run.findings.problems += await _unclosed_generations(system)


async def _streams_on(fault: Fault, run: ChaosRun, system: System) -> Sequence[Stream]:
    """Streams that run on the fault's place now."""
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


async def _unclosed_generations(system: System) -> list[str]:
    """Problems: generations that a replica still has open after every client has left."""
    nodes = [node for place, node in system.nodes.items() if place.tier is Tier.TARGET]
    drafts = [node for place, node in system.nodes.items() if place.tier is Tier.DRAFT]
    loads: list[Callable[[], Awaitable[Any]]] = [partial(_load, target_info, n) for n in nodes]
    loads += [partial(_load, draft_info, node) for node in drafts]
    try:
        counts = await open_generation_counts(loads)
    except grpc.aio.AioRpcError as error:
        return [f"the load of a replica is unknown: {error.code().name}"]
    return [
        f"{node.name} still has {count} generations open"
        for node, count in zip([*nodes, *drafts], counts, strict=True)
        if count
    ]


async def _load(info: Callable[[str], Awaitable[Any]], node: Node) -> Any:
    return (await info(node.address)).load
