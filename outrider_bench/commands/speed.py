"""`outrider bench speed`: tokens/s of one stream, with and without drafts, and of a peer."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import parse_list, takes
from outrider_bench.commands.peer import PeerName, check_peer, peers
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.load import Sample
    from outrider_bench.measuring.summary import Rounds, Speed
    from outrider_bench.measuring.workload import Variant

_NUM_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class SpeedOptions(BenchOptions):
    """Flags of `outrider bench speed`."""

    gammas: Annotated[str, typer.Option(help="Fixed γ to compare with: 1,2,3,5,8.")] = "2,5"
    prompts: Annotated[int, typer.Option(min=1, help="Number of different prompts.")] = 2
    sequential_gamma: Annotated[
        int, typer.Option(min=1, help="γ of the variants sequential and chain.")
    ] = 5
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Also sample at this temperature (rejection, coupled). Default: greedy only.",
        ),
    ] = None
    peer: Annotated[
        PeerName | None, typer.Option(help="Also measure this peer with the same models.")
    ] = None
    peer_threads: Annotated[str, typer.Option(help="Numbers of cores for the peer: 1,2.")] = "1,2"
    explain_gamma: Annotated[
        bool, typer.Option("--explain-gamma", help="Show why the last γ was chosen.")
    ] = False
    name: Annotated[str, typer.Option(help="Name of the files.")] = "speed"


@dataclass(frozen=True, eq=False)
class Way:
    """A variant of Outrider or of a peer. `plain`: name of its baseline."""

    name: str
    plain: str
    run: Callable[[int, int, int], Awaitable[Sample]]
    is_peer: bool = False
    temperature: float = 0.0


@dataclass(frozen=True)
class Result:
    """A table row. `num_different`: greedy outputs that differ from plain decoding in any token."""

    name: str
    is_peer: bool
    temperature: float
    tokens_per_s: Speed
    speed_up: float
    num_outputs: int
    num_different: int | None
    rounds: Rounds | None


@takes(SpeedOptions)
def speed(options: SpeedOptions) -> None:
    """Measure tokens/s of one stream: plain, sequential, drafting ahead, adaptive and fixed γ."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import require_matplotlib
    from outrider_bench.measuring.show import bench_console, reporting

    options = options.with_quick_defaults(gammas="2", peer_threads="1")
    if options.peer is not None:
        check_peer(options)
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    samples = run(_measure(options, console, document))
    document.samples += [sample.to_dict() for _, sample in samples]
    with reporting(console, document):
        _report(options, console, document, samples)


async def _measure(
    options: SpeedOptions, console: Console, document: Document
) -> list[tuple[Way, Sample]]:
    from outrider_bench.measuring.load import interleaved
    from outrider_bench.measuring.show import progress

    measured: list[tuple[Way, Sample]] = []
    async with contextlib.AsyncExitStack() as resources:
        system = await resources.enter_async_context(measured_system(options, console))
        system.require_draft()
        document.about(system)
        ways = [_ours(system, variant) for variant in variants(options)]
        if options.peer is not None:
            threads = parse_list(options.peer_threads, "--peer-threads", int)
            ways += await resources.enter_async_context(peers(options, system, threads))
        work = [(prompt, way) for prompt in range(options.prompts) for way in ways]
        num_steps = len(ways) + len(work) * options.repetitions
        warm_up = (len(ways), options.max_tokens / _NUM_WARM_UP_TOKENS)
        with progress(console, num_steps, document, measured, warm_up=warm_up) as step:
            for way in ways:
                step(f"warm-up: {way.name}")
                await way.run(0, _NUM_WARM_UP_TOKENS, -1)
            for repetition, (prompt, way) in interleaved(work, options.repetitions):
                step(way.name)
                measured.append((way, await way.run(prompt, options.max_tokens, repetition)))
    return measured


def _ours(system: System, variant: Variant) -> Way:
    from outrider_bench.measuring.load import one_output, run

    async def one(prompt: int, max_tokens: int, repetition: int) -> Sample:
        return await run(system, one_output(system, variant, prompt, max_tokens, repetition))

    temperature = variant.temperature
    return Way(variant.name, _named("plain", temperature), one, temperature=temperature)


def _named(name: str, temperature: float, method: str = "") -> str:
    return (
        name if temperature == 0 else " ".join(filter(None, (name, f"T {temperature:g}", method)))
    )


def variants(options: SpeedOptions) -> list[Variant]:
    """Greedy variants, and sampled ones with --temperature."""
    from outrider.cli.request import Method
    from outrider_bench.measuring.workload import Variant, adaptive, fixed, plain

    gamma = options.sequential_gamma
    sequential = Variant("sequential", gamma=gamma, lookahead=0, waits=True)
    chain = Variant("chain", gamma=gamma, lookahead=1, fan_out=1, waits=True)
    gammas = parse_list(options.gammas, "--gammas", int) if options.gammas else []
    ways = [plain(), sequential, chain, adaptive(), *(fixed(g) for g in gammas)]
    temperature = options.temperature
    if temperature:
        ways.append(replace(plain(temperature), name=_named("plain", temperature)))
        for method in (Method.rejection, Method.coupled):
            for variant in (sequential, chain, adaptive()):
                name = _named(variant.name, temperature, method.value)
                ways.append(
                    replace(variant, name=name, temperature=temperature, verification=method)
                )
    return ways


def _results(measured: list[tuple[Way, Sample]]) -> list[Result]:
    from outrider_bench.measuring.summary import Rounds, Speed

    ways = list(dict.fromkeys(way for way, _ in measured))
    samples = {way.name: [s for w, s in measured if w is way] for way in ways}
    results = []
    for way in ways:
        own = samples[way.name]
        found = Speed.of([s.tokens_per_s for s in own])
        base = Speed.of([s.tokens_per_s for s in samples[way.plain]])
        truth = {s.prompt: s.token_ids for s in samples["plain"]}
        different = sum(s.token_ids != truth.get(s.prompt, s.token_ids) for s in own)
        results.append(
            Result(
                name=way.name,
                is_peer=way.is_peer,
                temperature=way.temperature,
                tokens_per_s=found,
                speed_up=found.median / base.median,
                num_outputs=len(own),
                num_different=different if way.temperature == 0 else None,
                rounds=Rounds.of(own),
            )
        )
    return results


def _report(
    options: SpeedOptions,
    console: Console,
    document: Document,
    measured: list[tuple[Way, Sample]],
) -> None:
    from outrider_bench.measuring.plots import Bar, draw_bars
    from outrider_bench.measuring.show import finish

    results = _results(measured)
    document.results += [asdict(result) for result in results]
    document.add_goals(lambda: _goals(results))
    document.write()
    bars = [
        Bar(r.name, r.tokens_per_s.median, r.tokens_per_s.least, r.tokens_per_s.most, r.is_peer)
        for r in results
    ]
    draw_bars(document.plot_path, "One stream", "tokens/s: median, minimum, maximum", bars)
    finish(console, document, [_table(results)])
    if options.explain_gamma:
        from outrider_bench.commands.explain import show_decision

        stats = [s.stats for way, s in measured if way.name == "full" and s.stats is not None]
        console.print()
        if stats:
            show_decision(console, stats[-1])
        else:
            console.print("no output with adaptive γ was measured: nothing to explain")


def _table(results: list[Result]) -> Table:
    from outrider_bench.measuring.show import number, share, table, times

    columns = (
        "variant",
        "tokens/s",
        "range",
        "speed-up",
        "α",
        "τ",
        "γ",
        "hits",
        "waiting",
        "target ms",
    )
    shown = table("tokens/s of one stream", (*columns, "limit", "of limit", "outputs"))
    for result in results:
        rounds: Any = result.rounds
        rate = result.tokens_per_s
        cells = [""] * 8
        if rounds is not None:
            cells = [
                number(rounds.alpha), number(rounds.tau), number(rounds.mean_gamma, 1),
                share(rounds.hit_rate), share(rounds.draft_wait_share),
                number(1e3 * rounds.target_step_s, 1), number(rounds.limit_tokens_per_s, 1),
                share(rounds.limit_share),
            ]  # fmt: skip
        spread = f"{rate.least:.1f} … {rate.most:.1f}"
        is_plain = result.name.startswith("plain")
        shown.add_row(
            result.name, number(rate.median, 1), spread,
            times(result.speed_up, is_goal=not is_plain), *cells, _outputs(result),
        )  # fmt: skip
    return shown


def _outputs(result: Result) -> str:
    if result.num_different is None or result.name == "plain":
        return ""
    if result.num_different == 0:
        return "[green]same[/]"
    return f"[yellow]{result.num_different} of {result.num_outputs} differ[/]"


def _goals(results: list[Result]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    by_name = {result.name: result for result in results}
    plain, full = by_name["plain"], by_name["full"]
    rounds = full.rounds
    assert rounds is not None
    goals = [
        Goal("greedy, adaptive γ: over plain (P2, α 0.8)", 2.5, full.speed_up, pair="p2"),
        Goal(
            "greedy, adaptive γ: share of the limit τ / T_target",
            0.95,
            rounds.limit_share,
            pair="p2",
        ),
        Goal(
            "greedy: share of time waiting for drafts",
            0.03,
            rounds.draft_wait_share,
            is_most=True,
            pair="p2",
        ),
    ]
    for result in results:
        if result.temperature > 0 and result.name.startswith("full"):
            text = f"{result.name}: over plain, at least as greedy"
            goals.append(Goal(text, full.speed_up, result.speed_up))
    peer_results = [result for result in results if result.is_peer]
    if peer_results:
        best = max(r.tokens_per_s.median for r in peer_results)
        alone = [r.tokens_per_s.median for r in peer_results if r.name.endswith("plain, 1 core")]
        if alone:
            gain = plain.tokens_per_s.median / alone[0]
            goals.append(Goal("plain over plain of the peer, one core", 1.5, gain, pair="p2"))
        gain = full.tokens_per_s.median / best
        goals.append(Goal("speculative over the best of the peer", 2.5, gain, pair="p2"))
    return goals
