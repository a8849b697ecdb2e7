"""`outrider bench attacks`: a healthy stream during hostile load and component failures.

Each attack runs against a separate system. Owns the sequence of phases and their measurement;
`attackers` has the attacks, `attack_phases` the results.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError
from outrider_bench.commands.attack_phases import PHASES, Phase, goals, table
from outrider_bench.measuring.system import BenchOptions

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.chaos.system import System
    from outrider_bench.commands.attackers import Attack
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import Step

# A single stream gets about 45 tokens/s from these tiers.
_TARGET = "step_ms=1:40.0/64:40.0/1024:80.0"
_DRAFT = "step_ms=4,survival=0.8"
# New clients: one short request after another.
_PROBE_TOKENS = 8
_PROBE_GAP_S = 0.5
_MEMORY_GAP_S = 0.1
# Length of the healthy stream: at most this, and the context minus room for its prompt.
_MAX_TOKENS = 100_000
_NUM_PROMPT_TOKENS = 32
_MIB = 1 << 20
# Approximate start-up time of a system of simulated tiers.
_START_S = 5.0


@dataclass(frozen=True)
class AttackOptions(BenchOptions):
    """Flags of `outrider bench attacks`."""

    attacks: Annotated[
        str, typer.Option(help="all, or a list of long-prompts,unread,burst,failing,fail-over.")
    ] = "all"
    simulate_target: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Simulated target of all attacks except long-prompts."),
    ] = _TARGET
    simulate_draft: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Simulated draft of all attacks except long-prompts."),
    ] = _DRAFT
    seconds: Annotated[float, typer.Option(min=1, help="Duration of each phase.")] = 20.0
    clients: Annotated[int, typer.Option(min=1, help="Concurrent hostile streams.")] = 2000
    name: Annotated[str, typer.Option(help="Name of the files.")] = "attacks"


@takes(AttackOptions)
def attacks(options: AttackOptions) -> None:
    """Measure a healthy stream and new clients during attacks and failures.

    The attacks: long prompts, streams that are not read, bursts of calls, a replica whose every
    pass fails, and a Redis fail-over.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.attackers import ATTACKS
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(seconds=2.0, clients=50)
    names = list(ATTACKS) if options.attacks == "all" else options.attacks.split(",")
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(f"--attacks: {name!r} is unknown; allowed: all, {', '.join(ATTACKS)}")
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
        document.add_goals(lambda: goals(phases))
        document.write()
        finish(console, document, [table(phases)])


async def _measure(
    options: AttackOptions, names: list[str], console: Console, document: Document
) -> list[Phase]:
    from outrider_bench.commands.attackers import ATTACKS, attacked_system
    from outrider_bench.measuring.show import progress

    phases: list[Phase] = []
    expected_s = sum(
        _START_S + 2 * options.seconds + _attack_seconds(options, ATTACKS[name]) for name in names
    )
    num_steps = len(names) * len(PHASES)
    with progress(console, num_steps, document, phases, expected_s=expected_s) as step:
        for name in names:
            attack = ATTACKS[name]
            async with attacked_system(options, attack) as system:
                await _run_phases(options, system, attack, step, phases)
    return phases


def _attack_seconds(options: AttackOptions, attack: Attack) -> float:
    """Duration of the phase `during`."""
    return options.seconds if options.quick else max(options.seconds, attack.least_s)


async def _run_phases(
    options: AttackOptions, system: System, attack: Attack, step: Step, phases: list[Phase]
) -> None:
    """Runs the phases before, during and after with one healthy stream. Appends to `phases`."""
    from outrider_bench.chaos.faults import Tier
    from outrider_bench.chaos.system import Place

    healthy = HealthyLoad(system.endpoints[0])
    pid = system.nodes[Place(Tier.ORCHESTRATOR, 0)].pid
    own = replace(options, seconds=_attack_seconds(options, attack))
    async with contextlib.AsyncExitStack() as until, healthy.running():
        for name in PHASES:
            phase = Phase(attack.name, name)
            step(f"{attack.name}: {phase.name}")
            async with healthy.measured(phase, pid):
                if phase.name == "during":
                    statuses = await attack.run(own, system, until)
                    phase.attackers = {str(name): num for name, num in statuses.items()}
                else:
                    await asyncio.sleep(options.seconds)
            phases.append(phase)


class HealthyLoad:
    """Healthy load: one long stream, and new clients one after another."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._phase: Phase | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Waits until the stream has its first token; cancels the load at the end."""
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
        """Records into `phase` inside the block: the load, and the memory of process `pid`."""
        watching = asyncio.create_task(_watch_memory(phase, pid))
        self._phase = phase
        try:
            yield
        finally:
            self._phase = None
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _listen(self, stub: Any, begun: asyncio.Event) -> None:
        """Runs one generation after another, each as long as the context allows."""
        import grpc

        from outrider.v1 import orchestrator_pb2
        from outrider_bench.commands.attackers import generate_request

        info = await stub.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
        num_tokens = min(_MAX_TOKENS, info.target.max_context_len - _NUM_PROMPT_TOKENS)
        try:
            while True:
                await self._listen_to(stub.Generate(generate_request(num_tokens, seed=0)), begun)
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
        from outrider_bench.commands.attackers import first_token, generate_request

        for seed in range(1, 1_000_000):
            phase = self._phase
            status, first_s = await first_token(stub, generate_request(_PROBE_TOKENS, seed))
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
