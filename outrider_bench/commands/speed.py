"""`outrider bench speed`: one stream, with and without drafts, and beside a peer.

Owns which ways are compared and the table of them.
"""

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
    gammas: Annotated[str, typer.Option(help="Fixed γ to compare with: 1,2,3,5,8.")] = "2,5"
    prompts: Annotated[int, typer.Option(min=1, help="Different prompts.")] = 2
    sequential_gamma: Annotated[
        int, typer.Option(min=1, help="γ of drafting and verifying in turn.")
    ] = 5
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="Also at this one, by rejection and coupled. Default: greedy only."
        ),
    ] = None
    peer: Annotated[
        PeerName | None, typer.Option(help="Measure it too, in turn, on the same models.")
    ] = None
    peer_threads: Annotated[
        str, typer.Option(help="Cores for the peer, one run with each: 1,2.")
    ] = "1,2"
    explain_gamma: Annotated[
        bool, typer.Option("--explain-gamma", help="Show what the last γ was chosen by.")
    ] = False
    name: Annotated[str, typer.Option(help="Of the files.")] = "speed"


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run a prompt: ours, or a peer's. `plain`: the way it is compared with."""

    name: str
    plain: str
    run: Callable[[int, int, int], Awaitable[Sample]]
    is_peer: bool = False
    temperature: float = 0.0


@dataclass(frozen=True)
class Result:
    """A row. `num_different`: greedy outputs that are not plain decoding's, token for token."""

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
    """Tokens/s of one stream: plain, drafting in turn, ahead, and with γ chosen or fixed."""
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
    """Greedy ones, and those at the temperature that was asked for."""
    from outrider.cli.request import Method
    from outrider_bench.measuring.workload import Variant, adaptive, fixed, plain

    gamma = options.sequential_gamma
    sequential = Variant("sequential", gamma=gamma, lookahead=0, waits=True)
    chain = Variant("chain", gamma=gamma, lookahead=1, fan_out=1, waits=True)
    gammas = parse_list(options.gammas, "--gammas", int) if options.gammas else []
    ways = [plain(), sequential, chain, adaptive(), *(fixed(g) for g in gammas)]
    hot = options.temperature
    if hot:
        ways.append(replace(plain(hot), name=_named("plain", hot)))
        for method in (Method.rejection, Method.coupled):
            for variant in (sequential, chain, adaptive()):
                name = _named(variant.name, hot, method.value)
                ways.append(replace(variant, name=name, temperature=hot, verification=method))
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
    document.judge(lambda: _goals(results))
    document.write()
    bars = [
        Bar(r.name, r.tokens_per_s.median, r.tokens_per_s.least, r.tokens_per_s.most, r.is_peer)
        for r in results
    ]
    draw_bars(document.plot_path, "One stream", "tokens/s: median, least and most", bars)
    finish(console, document, [_table(results)])
    if options.explain_gamma:
        from outrider_bench.commands.explain import show_decision

        told = [s.stats for way, s in measured if way.name == "full" and s.stats is not None]
        console.print()
        if told:
            show_decision(console, told[-1])
        else:
            console.print("no output with γ chosen was measured: nothing to explain")


def _table(results: list[Result]) -> Table:
    from outrider_bench.measuring.show import number, share, table, times

    columns = ("", "tokens/s", "range", "speed-up", "α", "τ", "γ", "hits", "waits", "target ms")
    shown = table("one stream", (*columns, "limit", "of it", "outputs"))
    for result in results:
        rounds: Any = result.rounds
        rate = result.tokens_per_s
        told = [""] * 8
        if rounds is not None:
            told = [
                number(rounds.alpha), number(rounds.tau), number(rounds.mean_gamma, 1),
                share(rounds.hit_rate), share(rounds.draft_wait_share),
                number(1e3 * rounds.target_step_s, 1), number(rounds.limit_tokens_per_s, 1),
                share(rounds.limit_share),
            ]  # fmt: skip
        spread = f"{rate.least:.1f} … {rate.most:.1f}"
        is_plain = result.name.startswith("plain")
        shown.add_row(
            result.name, number(rate.median, 1), spread,
            times(result.speed_up, is_goal=not is_plain), *told, _outputs(result),
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
        Goal("greedy, γ chosen: over plain (P2, α 0.8)", 2.5, full.speed_up, pair="p2"),
        Goal(
            "greedy, γ chosen: share of the limit τ / T_target", 0.95, rounds.limit_share, pair="p2"
        ),
        Goal("greedy: waiting for drafts", 0.03, rounds.draft_wait_share, is_most=True, pair="p2"),
    ]
    for result in results:
        if result.temperature > 0 and result.name.startswith("full"):
            text = f"{result.name}: over plain, at least as greedy"
            goals.append(Goal(text, full.speed_up, result.speed_up))
    theirs = [result for result in results if result.is_peer]
    if theirs:
        best = max(r.tokens_per_s.median for r in theirs)
        alone = [r.tokens_per_s.median for r in theirs if r.name.endswith("plain, 1 core")]
        if alone:
            gain = plain.tokens_per_s.median / alone[0]
            goals.append(Goal("plain over the peer's, one core", 1.5, gain, pair="p2"))
        gain = full.tokens_per_s.median / best
        goals.append(Goal("speculative over the peer's best of all", 2.5, gain, pair="p2"))
    return goals
