"""`outrider bench swap`: a new draft joins under load and takes over; a bad one is rolled back.

Owns the processes and the course of events. The orchestrators decide; this command only watches.
Outputs are compared with those without a draft, token for token.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError
from outrider_bench.measuring.cores import CoreUse, core_per_tier
from outrider_bench.measuring.system import BenchOptions

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.cli.stack_options import StackOptions
    from outrider.cli.supervisor import Supervisor
    from outrider.client import AsyncClient
    from outrider_bench.commands.swap_load import Load
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import Step

# Noise of the made drafts, relative to the standard deviation of each weight.
_OLD_NOISE, _BAD_NOISE = 0.2, 2.0
# Simulated drafts: share of the survival of --simulate-draft.
_SURVIVAL = {"new": 1.0, "old": 0.5, "bad": 0.0}
_POLL_S = 0.2
# Longest wait for a decision.
_DECISION_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class SwapOptions(BenchOptions):
    """Flags of `outrider bench swap`. `draft` is the old one."""

    draft: Annotated[
        str | None,
        typer.Option(help="The old draft. Default: the new one with noise in its weights."),
    ] = None
    new: Annotated[
        str | None, typer.Option(help="The new draft. Default: the quickstart draft.")
    ] = None
    bad: Annotated[
        str | None,
        typer.Option(help="The bad draft. Default: the new one with much noise in its weights."),
    ] = None
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 8
    orchestrators: Annotated[int, typer.Option(min=1, help="Orchestrators.")] = 2
    share: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="--draft-canary-share of the orchestrators.")
    ] = 0.25
    min_generations: Annotated[
        int, typer.Option(min=2, help="--draft-canary-min-generations of the orchestrators.")
    ] = 20
    phase_s: Annotated[float, typer.Option(min=1, help="Seconds of the phases with one draft.")] = (
        30.0
    )
    gamma: Annotated[
        int | None,
        typer.Option(
            min=1, help="γ of all requests, to measure α whatever pays. Default: adaptive."
        ),
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Number of different prompts.")] = 28
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts file, as for `outrider distill --prompts`; the last 64 tokens of each "
            "are used. Default: beginnings of Python code."
        ),
    ] = None
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per output.")] = 64
    cores: Annotated[CoreUse, typer.Option(help="pinned or shared.")] = CoreUse.shared
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "swap"


@takes(SwapOptions)
def swap(options: SwapOptions) -> None:
    """Swap the draft under load: α before and after, failed streams, changed tokens.

    A better draft joins and must take over; then a bad one joins and must be rolled back. Real
    processes; the orchestrators decide by themselves. With --simulate-target and --simulate-draft,
    which is the new draft, the old one has half its survival and the bad one none.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.swap_load import PHASES
    from outrider_bench.commands.swap_report import events_table, goals, phases_table, summary
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(
        phase_s=2.0, streams=4, min_generations=2, share=0.5, orchestrators=1
    )
    console, document = bench_console(), Document(options.name, options)
    events = run(_measure(options, console, document))
    with reporting(console, document):
        phases = [summary(phase, document.samples) for phase in PHASES]
        document.results += [*phases, *events]
        document.add_goals(lambda: goals(document.samples, phases, events))
        document.write()
        finish(console, document, [phases_table(phases), events_table(events)])


async def _measure(
    options: SwapOptions, console: Console, document: Document
) -> list[dict[str, Any]]:
    from outrider.cli.supervisor import Supervisor
    from outrider_bench.commands.swap_load import PHASES
    from outrider_bench.measuring.show import progress

    events: list[dict[str, Any]] = []
    supervisor = Supervisor(options.out / "logs", lambda event: None)
    expected_s = 3 * options.phase_s + 120
    try:
        with progress(console, len(PHASES), document, events, expected_s=expected_s) as step:
            await _Swap(options, supervisor, document, events).run(step)
    finally:
        await supervisor.stop()
    return events


class _Swap:
    """One run. `events`: changes of the rollout, as they are seen."""

    def __init__(
        self,
        options: SwapOptions,
        supervisor: Supervisor,
        document: Document,
        events: list[dict[str, Any]],
    ) -> None:
        self._options = options
        self._supervisor = supervisor
        self._document = document
        self._events = events
        self._redis_url = supervisor.start_redis()
        self._stack_options = options.stack_options(core_per_tier(options.cores), draft="none")
        self._load: Load | None = None

    async def run(self, step: Step) -> None:
        from outrider.client import AsyncClient

        drafts = await asyncio.to_thread(_drafts, self._options, self._stack_options)
        async with contextlib.AsyncExitStack() as stack:
            addresses = await self._start_programs(drafts["old"])
            clients = [
                await stack.enter_async_context(AsyncClient(address, resume_for_s=0.0))
                for address in addresses
            ]
            self._load = load = await self._prepared(clients)
            await self._until(lambda roles: "current" in roles.values())
            await stack.enter_async_context(load.running(self._options.streams))
            step("old draft alone")
            await self._watch(self._options.phase_s)
            self._begin("new joins", step)
            await self._start_draft("new", drafts["new"])
            await self._until(lambda roles: roles.get("old") == "superseded")
            await self._supervisor.stop_one("draft-old")
            self._begin("new", step)
            await self._watch(self._options.phase_s)
            self._begin("bad joins", step)
            await self._start_draft("bad", drafts["bad"])
            await self._until(lambda roles: roles.get("bad") == "rolled_back")
            self._begin("after", step)
            await self._watch(self._options.phase_s)

    async def _start_programs(self, old: list[str]) -> list[str]:
        """Starts all programs with the old draft; returns the orchestrators' addresses."""
        from outrider.cli.stack import orchestrator_arguments, target_arguments

        options = self._options
        target = await self._supervisor.start("target", target_arguments(self._stack_options))
        await self._start_draft("old", old)
        arguments = [
            *orchestrator_arguments(self._stack_options, target, "registry", self._redis_url),
            f"--draft-canary-share={options.share}",
            f"--draft-canary-min-generations={options.min_generations}",
        ]
        names = [f"orchestrator-{number}" for number in range(1, options.orchestrators + 1)]
        return [await self._supervisor.start(name, arguments) for name in names]

    async def _start_draft(self, name: str, arguments: list[str]) -> None:
        arguments = [*arguments, f"--redis-url={self._redis_url}"]
        await self._supervisor.start(f"draft-{name}", arguments)

    async def _prepared(self, clients: Sequence[AsyncClient]) -> Load:
        """The load, with the outputs of all its requests without a draft."""
        from outrider.cli.request import Method
        from outrider_bench.commands.swap_load import Load, without_draft
        from outrider_bench.measuring.workload import Prompts, Variant

        options, stack_options = self._options, self._stack_options
        info = await clients[0].models()
        model = stack_options.target_model if stack_options.has_tokenizer else None
        prompts = Prompts(
            info.target.vocab_size,
            tokenizer=model,
            seed=options.seed,
            length=options.prompt_len,
            file=options.texts,
        )
        variants = [
            Variant("greedy", options.gamma),
            Variant("coupled", options.gamma, temperature=1.0, verification=Method.coupled),
        ]
        requests = [
            variant.request(prompts.ids(index), options.max_tokens, seed=index)
            for index in range(options.prompts)
            for variant in variants
        ]
        outputs = await asyncio.gather(*(without_draft(clients[0], each) for each in requests))
        return Load(clients, requests, outputs, self._document.samples)

    def _begin(self, phase: str, step: Step) -> None:
        assert self._load is not None, "the load runs"
        self._load.phase = phase
        step(phase)

    async def _watch(self, seconds: float) -> None:
        give_up_at = time.monotonic() + seconds
        while time.monotonic() < give_up_at:
            await self._look()
            await asyncio.sleep(_POLL_S)

    async def _until(self, holds: Callable[[dict[str, str]], bool]) -> None:
        """Watches until the roles, by draft, are so at each orchestrator. Raises TimeoutError."""
        async with asyncio.timeout(_DECISION_TIMEOUT_S):
            while True:
                if all(map(holds, await self._look())):
                    return
                await asyncio.sleep(_POLL_S)

    async def _look(self) -> list[dict[str, str]]:
        """Notes changes of the rollout. Returns the roles at each orchestrator."""
        assert self._load is not None, "it is prepared"
        found = [(await client.models()).draft_rollout for client in self._load.clients]
        rollouts = [rollout for rollout in found if rollout is not None]
        assert len(rollouts) == len(found), "the stack has a draft tier"
        newest = max(rollouts, key=lambda rollout: rollout.version)
        if newest.version > len(self._events):
            seconds = round(time.monotonic() - self._load.began_at, 1)
            self._events.append({"at_s": seconds, "decision": newest.decision})
        return [
            {Path(each.model).name or each.revision: each.role for each in rollout.revisions}
            for rollout in rollouts
        ]


def _drafts(options: SwapOptions, stack_options: StackOptions) -> dict[str, list[str]]:
    """Arguments of `python -m` for the three drafts; events show the names."""
    from outrider.cli.stack import draft_arguments, simulated_arguments

    if (options.simulate_target is None) != (options.simulate_draft is None):
        raise ConfigError("--simulate-target, --simulate-draft: one is given; give both or none")
    if options.simulate_draft is not None:
        simulations = _simulations(options, options.simulate_draft)
        return {
            name: simulated_arguments(stack_options, "draft_service", simulation)
            for name, simulation in simulations.items()
        }
    models = _models(options)
    return {name: draft_arguments(stack_options, str(model)) for name, model in models.items()}


def _simulations(options: SwapOptions, new: str) -> dict[str, str]:
    from outrider.settings.simulation import Simulation

    for name in ("target", "draft", "new", "bad"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: cannot be combined with --simulate-draft")
    simulation = Simulation.parse(new)
    return {
        name: str(
            replace(
                simulation, name=name, survival=tuple(share * each for each in simulation.survival)
            )
        )
        for name, share in _SURVIVAL.items()
    }


def _models(options: SwapOptions) -> dict[str, Path]:
    """Directories of the three drafts, with the drafts' names."""
    from outrider.quickstart_pair import DRAFT_PATH
    from outrider_bench.models.synthetic_pair import linked_copy, noisy_copy

    folder = options.out / "swap-drafts"
    new = Path(options.new or DRAFT_PATH)
    made = {"new": linked_copy(new, folder / "new")}
    for name, given, noise in (
        ("old", options.draft, _OLD_NOISE),
        ("bad", options.bad, _BAD_NOISE),
    ):
        made[name] = (
            linked_copy(Path(given), folder / name)
            if given is not None
            else noisy_copy(new, folder / name, noise)
        )
    return made
