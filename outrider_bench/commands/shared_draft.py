"""`outrider bench shared-draft`: two targets on one draft replica, beside a replica for each.

Owns the cases, their load and the report. Both targets are loaded at the same time either way, so
that only the draft tier differs. The tiers are simulated; the services and the network are real.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError
from outrider_bench.measuring.cores import CoreUse
from outrider_bench.measuring.system import BenchOptions

if TYPE_CHECKING:
    import grpc
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.measuring.document import Document, Goal

_TARGETS = ("step_ms=100,name=first", "step_ms=140,name=second")
_QUICK_DRAFT = "step_ms=1:4.0/128:4.0/512:16.0,survival=0.8"
# A step costs the same up to 8 rows, then it grows with the rows: at most 16 are served at a time.
_SLOW_DRAFT = "step_ms=1:24.0/8:24.0/64:192.0,survival=0.8"
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Case:
    """`num_streams`: of each target. `gamma`: fixed, rounds wait for the draft; None: adaptive."""

    name: str
    draft: str
    num_streams: tuple[int, int]
    gamma: int | None = None


CASES = (
    Case("draft has time", _QUICK_DRAFT, (4, 4)),
    Case("2 streams beside 24", _SLOW_DRAFT, (24, 2), gamma=4),
    # Each wants more than half: 20 streams, of which most wait for the draft, are more than 8 rows.
    Case("20 streams beside 40", _SLOW_DRAFT, (40, 20), gamma=4),
)


@dataclass(frozen=True)
class SharedDraftOptions(BenchOptions):
    """Flags of `outrider bench shared-draft`."""

    cores: Annotated[
        CoreUse, typer.Option(help="shared: no pinning; simulated passes need no core.")
    ] = CoreUse.shared
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each way, interleaved.")] = 3
    seconds: Annotated[float, typer.Option(min=1, help="Duration of a run.")] = 15.0
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds not counted at the begin of a run.")
    ] = 5.0
    name: Annotated[str, typer.Option(help="Name of the files.")] = "shared-draft"


@dataclass(frozen=True)
class Shares:
    """One case. By target: medians of tokens/s on the shared draft and on a draft of its own.

    `draft_share`: share of the tokens that the shared draft ran.
    """

    case: str
    num_streams: tuple[int, int]
    shared_tokens_per_s: tuple[float, float]
    own_tokens_per_s: tuple[float, float]
    draft_share: tuple[float, float]

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.shared_tokens_per_s, self.own_tokens_per_s, strict=True)
        return [shared / own for shared, own in pairs]


@takes(SharedDraftOptions)
def shared_draft(options: SharedDraftOptions) -> None:
    """Compare two targets on one draft replica with a replica for each; the tiers are simulated.

    Three loads: the draft has time for both, or is the bottleneck with unequal numbers of streams.
    """
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options.refuse_models()
    if options.settle >= options.seconds:
        raise ConfigError("--settle: must be less than --seconds")
    options = options.with_quick_defaults(seconds=2.0, settle=0.5, repetitions=1)
    console, document = bench_console(), Document(options.name, options)
    shares = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [asdict(each) | {"ratios": each.ratios} for each in shares]
        document.add_goals(lambda: goals(shares))
        document.write()
        finish(console, document, [table(shares)])


def goals(shares: Sequence[Shares]) -> list[Goal]:
    """Each target as fast as with a draft of its own while the draft has time; otherwise fair."""
    from outrider_bench.measuring.document import Goal

    by_case = {each.case: each for each in shares}
    free, both = by_case.get(CASES[0].name), by_case.get(CASES[2].name)
    own = "draft has time: tokens/s of the slower target over its own tier"
    fair = f"{CASES[2].name}: the smaller share of the draft's tokens"
    return [
        Goal(own, 0.95, min(free.ratios) if free else None),
        Goal(fair, 0.45, min(both.draft_share) if both else None),
    ]


def table(shares: Sequence[Shares]) -> Table:
    """Table with a row for each target of each case."""
    from outrider_bench.measuring import show

    columns = ("", "target", "streams", "shared tokens/s", "own tokens/s", "ratio", "draft share")
    shown = show.table("two targets on one draft replica", columns)
    for each in shares:
        for index, target in enumerate(("first", "second")):
            shown.add_row(
                each.case, target, str(each.num_streams[index]),
                show.number(each.shared_tokens_per_s[index], 1),
                show.number(each.own_tokens_per_s[index], 1),
                show.number(each.ratios[index]), show.share(each.draft_share[index]),
                end_section=index == 1,
            )  # fmt: skip
    return shown


async def _measure(
    options: SharedDraftOptions, console: Console, document: Document
) -> list[Shares]:
    from outrider_bench.measuring.load import interleaved
    from outrider_bench.measuring.show import progress

    shares: list[Shares] = []
    num_steps = len(CASES) * 2 * options.repetitions
    expected_s = num_steps * options.seconds
    with progress(console, num_steps, document, document.samples, expected_s=expected_s) as step:
        for case in CASES:
            runs: list[dict[str, Any]] = []
            async with _running(options, case) as systems:
                for repetition, way in interleaved(("shared", "own"), options.repetitions):
                    step(f"{case.name}: {way}")
                    measured = await _run(options, case, systems[way], systems["draft"], len(runs))
                    runs.append({"case": case.name, "way": way, "repetition": repetition})
                    runs[-1] |= measured
                    document.samples.append(runs[-1])
            shares.append(shares_of(case, runs))
    return shares


def shares_of(case: Case, runs: Sequence[dict[str, Any]]) -> Shares:
    """Medians of the runs of a case."""
    import statistics

    def medians(way: str, name: str) -> tuple[float, float]:
        values = [run[name] for run in runs if run["way"] == way]
        first, second = (statistics.median(column) for column in zip(*values, strict=True))
        return first, second

    first, second = medians("shared", "draft_tokens")
    total = max(first + second, 1)
    return Shares(
        case.name,
        case.num_streams,
        medians("shared", "tokens_per_s"),
        medians("own", "tokens_per_s"),
        (first / total, second / total),
    )


@contextlib.asynccontextmanager
async def _running(
    options: SharedDraftOptions, case: Case
) -> AsyncIterator[dict[str, list[grpc.aio.Channel]]]:
    """Two targets, a draft for both and one for each; channels to the orchestrators by way."""
    from outrider.cli.failures import require_engine
    from outrider.cli.stack import orchestrator_arguments, simulated_arguments
    from outrider.cli.supervisor import Supervisor
    from outrider.client.channel import open_channel
    from outrider_bench.measuring.cores import core_per_tier

    require_engine()
    given = replace(options.stack_options(core_per_tier(options.cores)), gamma=case.gamma)
    given = replace(given, simulate_target=_TARGETS[0], simulate_draft=case.draft)
    supervisor = Supervisor(options.out / "logs" / case.name.replace(" ", "-"), lambda _: None)
    try:
        redis_url = supervisor.start_redis()
        async with contextlib.AsyncExitStack() as channels:

            async def opened(name: str, target: str, draft: str) -> grpc.aio.Channel:
                arguments = orchestrator_arguments(given, target, draft, redis_url)
                if case.gamma is not None:
                    arguments += ["--draft-wait=always"]
                address = await supervisor.start(name, arguments)
                return await channels.enter_async_context(open_channel(address))

            targets, drafts = [], []
            for index, spec in enumerate(_TARGETS):
                arguments = simulated_arguments(given, "target_service", spec)
                targets.append(await supervisor.start(f"target-{index}", arguments))
            for index in range(3):
                arguments = simulated_arguments(given, "draft_service", case.draft)
                drafts.append(await supervisor.start(f"draft-{index}", arguments))
            yield {
                "shared": [
                    await opened(f"shared-{i}", t, drafts[2]) for i, t in enumerate(targets)
                ],
                "own": [await opened(f"own-{i}", t, drafts[i]) for i, t in enumerate(targets)],
                "draft": [await channels.enter_async_context(open_channel(drafts[2]))],
            }
    finally:
        await supervisor.stop()


async def _run(
    options: SharedDraftOptions,
    case: Case,
    channels: Sequence[grpc.aio.Channel],
    draft: Sequence[grpc.aio.Channel],
    number: int,
) -> dict[str, Any]:
    """Loads both targets at the same time. Tokens/s of each, and tokens that the draft ran.

    Neither counts the settling time, in which all generations start together.
    """
    async with asyncio.TaskGroup() as tasks:
        loads = [
            tasks.create_task(_load(options, channel, num, number))
            for channel, num in zip(channels, case.num_streams, strict=True)
        ]
        await asyncio.sleep(options.settle)
        before = await _draft_tokens(draft[0])
    after = await _draft_tokens(draft[0])
    ran = [after.get(name, 0) - before.get(name, 0) for name in ("first", "second")]
    return {"tokens_per_s": [load.result() for load in loads], "draft_tokens": ran}


async def _load(
    options: SharedDraftOptions, channel: grpc.aio.Channel, num_streams: int, number: int
) -> float:
    """Tokens/s of a closed loop after the settling time."""
    from outrider_bench.loadtest.driver import Phase, loaded_orchestrators
    from outrider_bench.loadtest.lengths import Lengths
    from outrider_bench.loadtest.measures import tokens_per_s
    from outrider_bench.loadtest.plan import Workload, endless
    from outrider_bench.loadtest.requests import RequestOptions

    workload = Workload(
        input_len=Lengths.parse(str(options.prompt_len), "--prompt-len"),
        output_len=Lengths.parse("uniform:64:128", "output_len"),
        num_turns=Lengths.parse("1", "turns"),
        seed=options.seed,
    )
    phase = Phase(
        await loaded_orchestrators(channel),
        RequestOptions(),
        number=number,
        seed=options.seed,
        run=options.name,
    )
    visits = endless(workload.conversations(512))
    await phase.closed_loop(visits, num_streams, until_s=options.seconds)
    return tokens_per_s(phase.records, options.settle, options.seconds)


async def _draft_tokens(channel: grpc.aio.Channel) -> dict[str, int]:
    """Tokens that the draft ran since its start, by target."""
    from outrider.v1 import draft_pb2, draft_pb2_grpc

    stub = draft_pb2_grpc.DraftServiceStub(channel)
    request = draft_pb2.DraftServiceGetModelInfoRequest()
    load = (await stub.GetModelInfo(request, timeout=_TIMEOUT_S)).load
    return {target.name: target.num_run_tokens_total for target in load.targets}
