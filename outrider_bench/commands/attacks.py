"""`outrider bench attacks`: a healthy stream beside hostile clients and failing parts.

Each attack has a system of its own. Owns the phases of an attack and what is measured in them; the
attacks are in `attackers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError
from outrider_bench.measuring.system import BenchOptions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.chaos.system import System
    from outrider_bench.commands.attackers import Attack
    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.show import Step

# One stream alone has about 45 tokens/s of them.
_TARGET = "step_ms=1:40.0/64:40.0/1024:80.0"
_DRAFT = "step_ms=4,survival=0.8"
# A new client asks for so many tokens, again and again.
_PROBE_TOKENS = 8
_PROBE_GAP_S = 0.5
_MEMORY_GAP_S = 0.1
# Of the healthy stream's generation, and of the context that it leaves for its prompt.
_MOST_TOKENS = 100_000
_NUM_SPARE_TOKENS = 32
_MIB = 1 << 20
_PHASES = ("before", "during", "after")
# Of a system of simulated tiers, about.
_START_S = 5.0


@dataclass(frozen=True)
class AttackOptions(BenchOptions):
    attacks: Annotated[
        str, typer.Option(help="all, or a list: long-prompts,unread,burst,failing,fail-over.")
    ] = "all"
    simulate_target: Annotated[
        str | None, typer.Option(metavar="SPEC", help="As in `outrider up`; all but long-prompts.")
    ] = _TARGET
    simulate_draft: Annotated[str | None, typer.Option(metavar="SPEC", help="Likewise.")] = _DRAFT
    seconds: Annotated[float, typer.Option(min=1, help="Of each phase.")] = 20.0
    clients: Annotated[int, typer.Option(min=1, help="Hostile streams or calls at once.")] = 2000
    name: Annotated[str, typer.Option(help="Of the files.")] = "attacks"


@dataclass
class Phase:
    """One phase of one attack. Times in seconds, memory of the orchestrator in MiB.

    `gaps_s`: between messages of the healthy stream. `first_token_s`: of new clients, who ask one
    after the other. `num_refused`: new clients refused with a retry hint; `failed`: all others.
    """

    attack: str
    name: str
    gaps_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    num_refused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    most_memory_mib: float = 0.0
    # What the attackers got, by status.
    attackers: dict[str, int] = field(default_factory=dict)
    # Why the healthy stream ended in this phase, if it did.
    ended: str | None = None

    def result(self) -> dict[str, Any]:
        """For JSON: distributions instead of samples."""
        from outrider_bench.loadtest.measures import Distribution

        told = asdict(self) | {"failed": dict(self.failed)}
        for name in ("gaps_s", "first_token_s"):
            values = told.pop(name)
            found = Distribution.of(values)
            told[name] = None if found is None else {**asdict(found), "most": max(values)}
        return told


@takes(AttackOptions)
def attacks(options: AttackOptions) -> None:
    """A healthy stream, and new clients, beside long prompts, streams that nobody reads, bursts of
    calls, a replica whose every pass fails, and a Redis fail-over.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.attackers import ATTACKS
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(seconds=2.0, clients=50)
    names = list(ATTACKS) if options.attacks == "all" else options.attacks.split(",")
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(f"--attacks: {name!r} is not one of all, {', '.join(ATTACKS)}")
    console, document = bench_console(), Document(options.name, options)
    phases = run(_measure(options, names, console, document))
    with reporting(console, document):
        document.results += [phase.result() for phase in phases]
        document.samples += [
            {
                "attack": phase.attack,
                "phase": phase.name,
                "gaps_s": [round(g, 5) for g in phase.gaps_s],
            }
            for phase in phases
        ]
        document.judge(lambda: goals(phases))
        document.write()
        finish(console, document, [table(phases)])


async def _measure(
    options: AttackOptions, names: list[str], console: Console, document: Document
) -> list[Phase]:
    from outrider_bench.commands.attackers import ATTACKS, attacked_system
    from outrider_bench.measuring.show import progress

    phases: list[Phase] = []
    expected_s = sum(
        _START_S + 2 * options.seconds + _seconds(options, ATTACKS[name]) for name in names
    )
    num_steps = len(names) * len(_PHASES)
    with progress(console, num_steps, document, phases, expected_s=expected_s) as step:
        for name in names:
            attack = ATTACKS[name]
            async with attacked_system(options, attack) as system:
                await _attacked(options, system, attack, step, phases)
    return phases


def _seconds(options: AttackOptions, attack: Attack) -> float:
    """Of the attack itself."""
    return options.seconds if options.quick else max(options.seconds, attack.least_s)


async def _attacked(
    options: AttackOptions, system: System, attack: Attack, step: Step, phases: list[Phase]
) -> None:
    """Before, during and after, of one stream. Adds to `phases`."""
    from outrider_bench.chaos.faults import Tier
    from outrider_bench.chaos.system import Place

    healthy = Healthy(system.endpoints[0])
    pid = system.nodes[Place(Tier.ORCHESTRATOR, 0)].pid
    own = replace(options, seconds=_seconds(options, attack))
    async with contextlib.AsyncExitStack() as until, healthy.running():
        for name in _PHASES:
            phase = Phase(attack.name, name)
            step(f"{attack.name}: {phase.name}")
            async with healthy.measured(phase, pid):
                if phase.name == "during":
                    statuses = await attack.run(own, system, until)
                    phase.attackers = {str(name): num for name, num in statuses.items()}
                else:
                    await asyncio.sleep(options.seconds)
            phases.append(phase)


class Healthy:
    """One long stream, new clients one after the other, and the orchestrator's memory."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._phase: Phase | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The stream has begun on entering, and is cancelled at the end."""
        from outrider.client.channel import open_channel
        from outrider.v1 import orchestrator_pb2_grpc

        async with open_channel(self._endpoint) as channel:
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            begun = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(self._listen(stub, begun))
                await begun.wait()
                probing = tasks.create_task(self._probe(stub))
                try:
                    yield
                finally:
                    listening.cancel()
                    probing.cancel()

    @contextlib.asynccontextmanager
    async def measured(self, phase: Phase, pid: int) -> AsyncIterator[None]:
        """All that happens in the block is the phase's."""
        watching = asyncio.create_task(_watch_memory(phase, pid))
        self._phase = phase
        try:
            yield
        finally:
            self._phase = None
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _listen(self, stub: Any, begun: asyncio.Event) -> None:
        """One generation after another, each as long as the context allows."""
        import grpc

        from outrider.v1 import orchestrator_pb2
        from outrider_bench.commands.attackers import asking

        info = await stub.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
        num_tokens = min(_MOST_TOKENS, info.target.max_context_len - _NUM_SPARE_TOKENS)
        try:
            while True:
                await self._listen_to(stub.Generate(asking(num_tokens, seed=0)), begun)
        except grpc.aio.AioRpcError as error:
            if self._phase is None:
                raise
            self._phase.ended = f"{error.code().name}: {error.details()}"

    async def _listen_to(self, call: Any, begun: asyncio.Event) -> None:
        last = None
        try:
            async for _ in call:
                now = time.monotonic()
                if last is not None and self._phase is not None:
                    self._phase.gaps_s.append(now - last)
                begun.set()
                last = now
        finally:
            call.cancel()

    async def _probe(self, stub: Any) -> None:
        from outrider_bench.commands.attackers import asking, first_token

        for seed in range(1, 1_000_000):
            phase = self._phase
            status, first_s = await first_token(stub, asking(_PROBE_TOKENS, seed))
            if phase is not None:
                if status == "OK":
                    phase.first_token_s.append(first_s)
                elif status == "RESOURCE_EXHAUSTED":
                    phase.num_refused += 1
                else:
                    phase.failed[status] += 1
            await asyncio.sleep(_PROBE_GAP_S)


async def _watch_memory(phase: Phase, pid: int) -> None:
    from outrider_bench.measuring.process import memory_bytes

    while True:
        resident, _ = memory_bytes(pid)
        phase.most_memory_mib = max(phase.most_memory_mib, resident / _MIB)
        await asyncio.sleep(_MEMORY_GAP_S)


def goals(phases: list[Phase]) -> list[Goal]:
    """The healthy stream goes on; beside long prompts its p99 is at most twice what it was."""
    from outrider_bench.measuring.document import Goal

    by_name = {(phase.attack, phase.name): phase for phase in phases}
    told = []
    for attack in dict.fromkeys(phase.attack for phase in phases):
        ended = sum(by_name[attack, name].ended is not None for name in _PHASES)
        told.append(Goal(f"{attack}: healthy streams that ended", 0, ended, is_most=True))
        failed = sum((by_name[attack, name].failed for name in _PHASES), Counter[str]())
        if attack == "fail-over":  # new generations need Redis; they are told so
            del failed["UNAVAILABLE"]
        told.append(Goal(f"{attack}: new clients that failed", 0, failed.total(), is_most=True))
    if ("long-prompts", "before") in by_name:
        before, during = (_p99(by_name["long-prompts", name]) for name in ("before", "during"))
        ratio = during / before if before and during else None
        told.append(Goal("long-prompts: p99 during over before", 2.0, ratio, is_most=True))
    return told


def _p99(phase: Phase) -> float | None:
    from outrider_bench.loadtest.measures import Distribution

    found = Distribution.of(phase.gaps_s)
    return None if found is None else found.p99


def table(phases: list[Phase]) -> Table:
    from outrider_bench.loadtest.measures import Distribution
    from outrider_bench.measuring import show

    columns = ("attack", "", "messages", "gap p50 ms", "p99", "longest", "new clients",
               "token 1 p50 s", "longest ", "refused", "failed", "MiB", "attackers")  # fmt: skip
    shown = show.table("a healthy stream, new clients, memory", columns)
    for phase in phases:
        gaps, firsts = Distribution.of(phase.gaps_s), Distribution.of(phase.first_token_s)
        shown.add_row(
            phase.attack, phase.name, str(len(phase.gaps_s)),
            show.number(1e3 * gaps.p50 if gaps else None, 0),
            show.number(1e3 * gaps.p99 if gaps else None, 0),
            show.number(1e3 * max(phase.gaps_s) if gaps else None, 0),
            str(len(phase.first_token_s)),
            show.number(firsts.p50 if firsts else None),
            show.number(max(phase.first_token_s) if firsts else None),
            str(phase.num_refused), _counts(phase.failed),
            show.number(phase.most_memory_mib, 0), _counts(phase.attackers),
        )  # fmt: skip
    return shown


def _counts(statuses: Mapping[str, int]) -> str:
    return " ".join(f"{name} {num}" for name, num in statuses.items())
