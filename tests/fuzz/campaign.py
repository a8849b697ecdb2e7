"""A whole fuzzing run against one service: attack and healthy session together, then the account.

Owns what must hold afterwards: the process alive and serving, counters that reconcile, KV given
back, memory flat. Knows no messages.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import grpc

from tests.fuzz.attack import Attack, CallAttack, StreamAttack
from tests.fuzz.corpus import DRAFT, ORCHESTRATOR, TARGET
from tests.fuzz.findings import Findings
from tests.fuzz.fronts import SETTLE_S, Fronts, Load
from tests.fuzz.healthy import CallerSession, DraftSession, Session, TargetSession, Truth
from tests.fuzz.system import rss_bytes
from tests.stack import eventually

# Memory is compared with that after the first tenth: caches are full by then.
_WARM_UP_SHARE = 0.1
MAX_GROWTH_BYTES = 100 << 20


@dataclass
class Report:
    """What a run has come to."""

    service: str
    num_messages: int
    findings: Findings = field(default_factory=Findings)
    duration_s: float = 0.0
    rss_before: int = 0
    rss_after: int = 0

    def __str__(self) -> str:
        found = self.findings
        lines = [
            f"{self.service}: {self.num_messages} messages in {self.duration_s:.1f} s "
            f"({self.num_messages / max(self.duration_s, 1e-9):.0f}/s)",
            f"  sent      {_counts(found.sent)}",
            f"  answers   {_counts(found.answers)}",
            f"  statuses  {_counts(found.statuses)}",
            f"  healthy   {found.num_healthy_tokens} tokens, as undisturbed",
            f"  memory    {self.rss_before >> 20} MiB before, {self.rss_after >> 20} MiB after",
        ]
        lines += [f"  DEFECT    {defect}" for defect in found.defects]
        return "\n".join([*lines, f"  {len(found.defects)} defects"])


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {num}" for name, num in sorted(counts.items())) or "none"


def _attack(fronts: Fronts, service: str, seed: int, findings: Findings) -> Attack:
    channel = fronts.channels[service]
    if service == "orchestrator":
        return CallAttack(channel, ORCHESTRATOR, seed, findings)
    dialect = TARGET if service == "target" else DRAFT
    return StreamAttack(channel, dialect, seed, findings)


def _healthy(fronts: Fronts, service: str, truth: Truth, findings: Findings) -> Session:
    if service == "orchestrator":
        return CallerSession(fronts.orchestrator, truth, findings)
    if service == "target":
        return TargetSession(fronts.target, truth, findings)
    return DraftSession(fronts.draft, truth, findings)


async def fuzz(
    fronts: Fronts, service: str, truth: Truth, *, num_messages: int, seed: int, pid: int = 0
) -> Report:
    """Attacks the service beside a healthy session. `pid` 0: in this process, not measured."""
    report = Report(service, num_messages)
    findings = report.findings
    attack = _attack(fronts, service, seed, findings)
    before = await fronts.loads(service)
    started_at, stopped = time.monotonic(), asyncio.Event()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_healthy(fronts, service, truth, findings).run(stopped))
            num_first = int(_WARM_UP_SHARE * num_messages)
            await attack.run(num_first)
            report.rss_before = rss_bytes(pid)
            await attack.run(num_messages - num_first)
            stopped.set()
    except* (AssertionError, TimeoutError, grpc.aio.AioRpcError) as group:
        for error in group.exceptions:
            findings.defect(f"the healthy session: {type(error).__name__}: {error}")
    report.duration_s = time.monotonic() - started_at
    await _check(fronts, service, before, findings)
    report.rss_after = rss_bytes(pid)
    if report.rss_after - report.rss_before > MAX_GROWTH_BYTES:
        findings.defect(f"memory grew by {(report.rss_after - report.rss_before) >> 20} MiB")
    if pid and not report.rss_after:
        findings.defect("the process is gone")
    return report


async def _check(fronts: Fronts, service: str, before: list[Load], findings: Findings) -> None:
    async def nothing_is_open() -> bool:
        return all(
            load.num_open_generations == 0 and load.num_opened_total == load.num_closed_total
            for load in await fronts.loads(service)
        )

    async def all_is_given_back() -> bool:
        loads = zip(await fronts.loads(service), before, strict=True)
        return all(
            load.num_idle_sessions == 0 and load.kv_used_tokens <= former.kv_used_tokens
            for load, former in loads
        )

    try:
        await eventually(nothing_is_open, SETTLE_S)
        await fronts.forget(service, findings.session_ids, findings.fingerprints)
        await eventually(all_is_given_back, SETTLE_S)
        if not await fronts.is_serving(service):
            findings.defect("health does not say SERVING")
    except (AssertionError, TimeoutError):
        findings.defect(f"not settled within {SETTLE_S:g} s: {await fronts.loads(service)}")
    except grpc.aio.AioRpcError as error:
        findings.defect(f"it does not answer: {error.code().name} {error.details()}")
