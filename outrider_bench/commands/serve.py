"""`outrider bench serve`: load test of a running orchestrator, measured by its clients.

Owns the sequence: plan, connect, measure, report.
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
from outrider.errors import ConfigError
from outrider_bench.commands.serve_options import (
    ServeOptions,
    load_pattern,
    parse_slo,
    planned_visits,
    variants,
)

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.cli.failures import Signalled
    from outrider_bench.loadtest.campaign import Campaign, LoadPattern
    from outrider_bench.loadtest.phase_results import Passes
    from outrider_bench.loadtest.plan import Conversation
    from outrider_bench.loadtest.records import Record
    from outrider_bench.loadtest.slo import Slo


@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Load-test a running orchestrator: latency, throughput, goodput, with and without speculation.

    Closed loop (--concurrency), open loop (--rate) or a trace (--trace). Ctrl-C reports the results
    so far.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.serve_report import report
    from outrider_bench.measuring.show import bench_console

    options.check()
    console = bench_console()
    slo, planned = parse_slo(options), planned_visits(options, console.print)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {options.out}: {error.strerror or error}") from error
    campaign, stopped = run(_measure(options, planned, slo, console))
    report(options, campaign, slo, console, is_cut=stopped is not None)
    if stopped is not None:
        raise stopped


async def _measure(
    options: ServeOptions, planned: Sequence[Conversation], slo: Slo | None, console: Console
) -> tuple[Campaign, Signalled | None]:
    """Runs the campaign; returns it, and the signal that ended it early. Raises CallFailed."""
    from outrider.cli.running import survive_signal
    from outrider_bench.commands.serve_connections import connected
    from outrider_bench.loadtest.campaign import Campaign

    async with connected(options, planned) as orchestrator:
        _check_prompts(planned, orchestrator.info.target.max_context_len)
        campaign = Campaign(
            orchestrators=orchestrator,
            run=secrets.token_hex(4),
            seed=options.seed,
            read_passes=_pass_reader(options),
        )
        if not orchestrator.info.HasField("draft"):
            console.print("[yellow]no draft replica is connected: both variants are plain[/]")
        with _progress(console, campaign):
            try:
                await _run(options, campaign, planned, slo, load_pattern(options), console)
            except asyncio.CancelledError:
                if not any(stretch.records for stretch in campaign.all_results):
                    console.print("[yellow]stopped: nothing has been measured[/]")
                    raise
                return campaign, survive_signal()
    return campaign, None


def _check_prompts(planned: Sequence[Conversation], max_context_len: int) -> None:
    """Raises ConfigError if a prompt exceeds the context, before anything is sent.

    `max_context_len` 0: not known.
    """
    longest = max(job.prompt_len for visit in planned for job in visit.jobs)
    if longest >= max_context_len > 0:
        raise ConfigError(
            f"--input-len, --trace: a prompt of {longest} tokens; the context has {max_context_len}"
        )


async def _run(
    options: ServeOptions,
    campaign: Campaign,
    planned: Sequence[Conversation],
    slo: Slo | None,
    arrivals: LoadPattern,
    console: Console,
) -> None:
    from outrider_bench.loadtest.campaign import expected_s, warm_up_clients
    from outrider_bench.measuring.show import duration

    ways, visit_s = variants(options), None
    if options.warm_up:
        began_at, first = time.monotonic(), planned[: options.warm_up]
        await campaign.warm_up(ways, first)
        visit_s = (time.monotonic() - began_at) * warm_up_clients(first) / len(ways) / len(first)
    if not options.sweep:
        seconds = expected_s(len(ways), planned, arrivals, options.repetitions, visit_s)
        _note(console, _announcement(len(ways), planned, arrivals, seconds))
        await campaign.compare(ways, planned, arrivals, options.repetitions)
        return
    assert slo is not None, "checked"
    assert arrivals.rate is not None, "checked"

    num = sum(len(visit.jobs) for visit in planned)
    _note(
        console,
        f"searching with {len(ways)} x {num} requests at each rate, about "
        f"{duration(num / arrivals.rate)} at the first; the number of rates is unknown; "
        "Ctrl-C reports the results so far",
    )

    def attains(records: Sequence[Record]) -> float:
        return sum(map(slo.is_met, records)) / max(1, len(records))

    for way in ways:
        campaign.searches[way.name] = await campaign.search(
            way,
            planned,
            arrivals.rate,
            attains,
            options.attain,
            arrivals.burstiness,
            options.precision,
        )


def _announcement(
    num_ways: int, planned: Sequence[Conversation], arrivals: LoadPattern, seconds: float | None
) -> str:
    """Announcement of the expected duration."""
    from outrider_bench.measuring.show import duration

    num = sum(len(visit.jobs) for visit in planned)
    until = f"{num_ways} x {num} requests"
    if seconds is None:
        until += " run until all have ended"
    elif arrivals.num_clients is not None and arrivals.rate is None:
        until += f" take about {duration(seconds)}, estimated from the warm-up"
    else:
        source = "the trace" if arrivals.rate is None else f"{arrivals.rate:g} requests/s"
        until += f" are sent in about {duration(seconds)}, according to {source}"
    return f"{until}; Ctrl-C reports the results so far"


def _note(console: Console, text: str) -> None:
    console.print(f"[dim]{text}[/]", highlight=False, soft_wrap=True)


def _pass_reader(options: ServeOptions) -> Callable[[], Awaitable[Passes]] | None:
    """Function that reads the counters of all target replicas; None without --target-endpoint.

    It raises ConfigError if a replica does not answer.
    """
    if options.target_endpoint is None:
        return None
    import grpc

    from outrider.client.connection import call_failed
    from outrider.settings.addresses import require_endpoint
    from outrider_bench.loadtest.phase_results import Passes
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
    """Shows a progress bar of the running phase: requests answered and failures."""
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
        speed_estimate_period=math.inf,  # requests may take minutes
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
                bar.update(task, failures=f"{num_failures} failed: {escape(record.status)}")

        campaign.on_phase, campaign.on_end = begin, end
        yield
