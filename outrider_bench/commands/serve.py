"""`outrider bench serve`: a load test of any orchestrator, as its callers live through it.

Owns the order of things: plan, connect, measure, report. Starts no service.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from outrider.cli.options import takes
from outrider.cli.request import endpoints_of
from outrider.errors import ConfigError
from outrider_bench.commands.serve_options import ServeOptions, manner, promised, variants, visits

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.cli.failures import Signalled
    from outrider_bench.loadtest.campaign import Campaign, Manner
    from outrider_bench.loadtest.plan import Visit
    from outrider_bench.loadtest.records import Record
    from outrider_bench.loadtest.slo import Slo
    from outrider_bench.loadtest.stretches import Passes


@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Load an orchestrator that runs; latencies, throughput, goodput, with speculation and without.

    Closed loop (--concurrency), open loop (--rate) or a trace. Ctrl-C reports what was measured.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.serve_report import report
    from outrider_bench.measuring.show import bench_console

    options.check()
    console = bench_console()
    slo, asked = promised(options), visits(options, console.print)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {options.out}: {error.strerror or error}") from error
    campaign, stopped = run(_measure(options, asked, slo, console))
    report(options, campaign, slo, console, is_cut=stopped is not None)
    if stopped is not None:
        raise stopped


async def _measure(
    options: ServeOptions, asked: Sequence[Visit], slo: Slo | None, console: Console
) -> tuple[Campaign, Signalled | None]:
    """What was measured, and the signal that ended it early. Raises CallFailed."""
    import grpc

    from outrider.cli.running import survive_signal
    from outrider.client.channel import open_channel
    from outrider.client.client import call_failed
    from outrider_bench.loadtest.campaign import Campaign
    from outrider_bench.loadtest.driver import subject

    async with contextlib.AsyncExitStack() as stack:
        endpoints = endpoints_of(options.endpoint)
        channels = [
            await stack.enter_async_context(open_channel(endpoint, options.access, is_spread=True))
            for _ in range(options.connections)
            for endpoint in endpoints
        ]
        try:
            whom = await subject(*channels)
        except grpc.aio.AioRpcError as error:
            raise await call_failed(error, endpoints[0], options.access) from error
        _check_prompts(asked, whom.info.target.max_context_len)
        campaign = Campaign(
            subject=whom,
            run=secrets.token_hex(4),
            seed=options.seed,
            read_passes=_pass_reader(options),
        )
        if not whom.info.HasField("draft"):
            console.print("[yellow]no draft replica is connected: both variants are plain[/]")
        with _progress(console, campaign):
            try:
                await _run(options, campaign, asked, slo, manner(options), console)
            except asyncio.CancelledError:
                if not any(stretch.records for stretch in campaign.all_stretches):
                    console.print("[yellow]stopped: nothing has been measured[/]")
                    raise
                return campaign, survive_signal()
    return campaign, None


def _check_prompts(asked: Sequence[Visit], max_context_len: int) -> None:
    """Of those that would be made here, only to be refused there. Raises ConfigError."""
    longest = max(job.prompt_len for visit in asked for job in visit.jobs)
    if longest >= max_context_len:
        raise ConfigError(
            f"--input-len, --trace: a prompt of {longest} tokens; the context is {max_context_len}"
        )


async def _run(
    options: ServeOptions,
    campaign: Campaign,
    asked: Sequence[Visit],
    slo: Slo | None,
    how: Manner,
    console: Console,
) -> None:
    from outrider_bench.loadtest.campaign import expected_s, warm_up_callers
    from outrider_bench.measuring.show import duration

    ways, visit_s = variants(options), None
    if options.warm_up:
        began_at, first = time.monotonic(), asked[: options.warm_up]
        await campaign.warm_up(ways, first)
        visit_s = (time.monotonic() - began_at) * warm_up_callers(first) / len(ways) / len(first)
    if not options.sweep:
        seconds = expected_s(len(ways), asked, how, options.repetitions, visit_s)
        _say(console, _announcement(len(ways), asked, how, seconds))
        await campaign.compare(ways, asked, how, options.repetitions)
        return
    assert slo is not None, "checked"
    assert how.rate is not None, "checked"

    num = sum(len(visit.jobs) for visit in asked)
    _say(
        console,
        f"a search with {len(ways)} x {num} requests at each rate, the first about "
        f"{duration(num / how.rate)} long; the number of rates is not known; Ctrl-C reports the "
        "results so far",
    )

    def attains(records: Sequence[Record]) -> float:
        return sum(map(slo.is_met, records)) / max(1, len(records))

    for way in ways:
        campaign.found[way.name] = await campaign.search(
            way, asked, how.rate, attains, options.attain, how.burstiness, options.precision
        )


def _announcement(num_ways: int, asked: Sequence[Visit], how: Manner, seconds: float | None) -> str:
    """How long it takes, before minutes are spent on it."""
    from outrider_bench.measuring.show import duration

    num = sum(len(visit.jobs) for visit in asked)
    until = f"{num_ways} x {num} requests"
    if seconds is None:
        until += " take until all are answered"
    elif how.num_callers is not None:
        until += f" take about {duration(seconds)}, by the warm-up"
    else:
        source = "the trace's times" if how.rate is None else f"{how.rate:g} requests/s"
        until += f" are sent in about {duration(seconds)}, by {source}"
    return f"{until}; Ctrl-C reports the results so far"


def _say(console: Console, words: str) -> None:
    console.print(f"[dim]{words}[/]", highlight=False, soft_wrap=True)


def _pass_reader(options: ServeOptions) -> Callable[[], Awaitable[Passes]] | None:
    """Asks each target replica for its counters; raises ConfigError where it does not answer."""
    if options.target_endpoint is None:
        return None
    import grpc

    from outrider.client.client import call_failed
    from outrider.settings.addresses import require_endpoint
    from outrider_bench.loadtest.stretches import Passes
    from outrider_bench.measuring.tiers import target_info

    parts = (part.strip() for part in options.target_endpoint.split(","))
    addresses = [part for part in parts if part]
    for address in addresses:
        require_endpoint(address, "--target-endpoint")

    async def load(address: str) -> Any:
        try:
            return (await target_info(address)).load
        except grpc.aio.AioRpcError as error:
            failed = await call_failed(error, address)
            raise ConfigError(f"--target-endpoint: {failed}") from error

    async def read() -> Passes:
        loads = [await load(address) for address in addresses]
        return Passes(
            sum(load.num_steps_total for load in loads),
            sum(load.num_rows_total for load in loads),
            sum(load.num_tokens_total for load in loads),
        )

    return read


@contextlib.contextmanager
def _progress(console: Console, campaign: Campaign) -> Iterator[None]:
    """A bar of requests answered in the phase under way, and what went wrong in it."""
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[dim]{task.description}[/]"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answered"),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/]"),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[failures]}[/]"),
    )
    shows = console.is_terminal
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not shows,
        speed_estimate_period=math.inf,  # a request may take minutes
    ) as bar:
        task = bar.add_task("warm-up", failures="")
        num_failures = 0

        def begin(name: str, num_requests: int) -> None:
            nonlocal num_failures
            num_failures = 0
            bar.reset(task, total=num_requests, description=escape(name), failures="")
            if not shows:
                console.print(f"{escape(name)}: {num_requests} requests", highlight=False)

        def end(record: Record) -> None:
            nonlocal num_failures
            bar.advance(task)
            if not record.is_ok:
                num_failures += 1
                bar.update(task, failures=f"{num_failures} not answered: {escape(record.status)}")

        campaign.on_phase, campaign.on_end = begin, end
        yield
