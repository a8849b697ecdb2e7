"""Layout of `outrider top`: tables of requests, speculation and replicas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outrider.telemetry.scraping import Change

if TYPE_CHECKING:
    from outrider.cli.top import Watched

_ORIGINS = ("accepted", "recovered", "bonus", "plain")
_BAD = "bold red"


def view(watched: Sequence[Watched]) -> RenderableType:
    """All programs: orchestrators, replicas, then programs without metrics by address."""
    changes = [change for program in watched if (change := program.change) is not None]
    orchestrators = [c for c in changes if c.after.has("outrider_num_requests_running")]
    replicas = [c for c in changes if c.after.has("outrider_replica_state")]
    parts: list[RenderableType] = []
    for change in orchestrators:
        title = f"orchestrator {change.after.address}"
        tables = Group(_requests(change), _speculation(change), _dependencies(change))
        parts.append(Panel(tables, title=title, title_align="left"))
    if replicas:
        parts.append(Panel(_replicas(replicas), title="replicas", title_align="left"))
    known = {change.after.address for change in (*orchestrators, *replicas)}
    for program in watched:
        if program.error:
            parts.append(Text(program.error, _BAD))
        elif program.address not in known:
            parts.append(
                Text(
                    f"{program.address} is still starting, or is not an Outrider program", "yellow"
                )
            )
    return Group(*parts)


def _row(pairs: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_row(*(Text.assemble((name + " ", "dim"), (value, "bold")) for name, value in pairs))
    return table


def _requests(change: Change) -> Group:
    now = change.after
    failed = sum(
        change.increase("outrider_requests_total", status=labels["status"])
        for labels, _ in now.find("outrider_requests_total")
        if labels["status"] not in ("OK", "CANCELLED")
    )
    counts = [
        ("streams", _number(now.total("outrider_num_requests_running"))),
        ("queued", _number(now.total("outrider_num_requests_waiting"))),
        ("tokens/s", _number(change.rate("outrider_generation_tokens_total"))),
        ("requests/s", _number(change.rate("outrider_requests_total"))),
        ("failed", _number(failed)),
    ]
    latencies = [
        (
            name,
            "/".join(_time(change.quantile(f"outrider_{metric}_seconds", q)) for q in (0.5, 0.99)),
        )
        for name, metric in (
            ("first token p50/p99", "time_to_first_token"),
            ("between chunks", "inter_token_latency"),
            ("queue", "request_queue_time"),
            ("total", "e2e_request_latency"),
        )
    ]
    return Group(_row(counts), _row(latencies))


def _speculation(change: Change) -> Group:
    accepted = change.increase("outrider_spec_decode_num_accepted_tokens_total")
    verified = accepted + change.increase("outrider_spec_decode_num_rejected_tokens_total")
    drafts = change.increase("outrider_spec_decode_num_drafts_total")
    lookups = change.increase("outrider_lookahead_rounds_total")
    hits = change.increase("outrider_lookahead_rounds_total", outcome="hit")
    tokens = change.increase("outrider_tokens_total")
    speculation = [
        ("acceptance", _share(accepted, verified)),
        ("tokens/drafted round", f"{1 + accepted / drafts:.2f}" if drafts else "–"),
        ("γ", _number(change.after.total("outrider_gamma"))),
        ("look-ahead hits", _share(hits, lookups)),
        ("draft wait p50", _time(change.quantile("outrider_draft_round_trip_seconds", 0.5))),
        ("verify p50", _time(change.quantile("outrider_verify_round_trip_seconds", 0.5))),
    ]
    origins = [
        (origin, _share(change.increase("outrider_tokens_total", origin=origin), tokens))
        for origin in _ORIGINS
    ]
    return Group(_row(speculation), _row(origins))


def _dependencies(change: Change) -> Text:
    """State of the replicas and of Redis, as the orchestrator sees them."""
    text = Text()
    for labels, value in change.after.find("outrider_replicas"):
        if value:
            style = "green" if labels["state"] == "ready" else _BAD
            text.append(f"{labels['tier']} {labels['state']} {value:.0f}   ", style)
    is_up = change.after.total("outrider_redis_up") > 0
    text.append("redis up" if is_up else "redis down", "green" if is_up else _BAD)
    return text


_COLUMNS = (
    "tier", "address", "state", "open", "idle", "KV", "queue", "passes/s", "rows", "tokens",
    "pass p50", "prefix hits",
)  # fmt: skip


def _replicas(changes: Sequence[Change]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in _COLUMNS:
        is_name = name in _COLUMNS[:3]
        table.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for change in sorted(changes, key=lambda c: (_tier(c), c.after.address)):
        table.add_row(*_cells(change))
    return table


def _tier(change: Change) -> str:
    return next(labels["tier"] for labels, _ in change.after.find("outrider_replica_state"))


def _cells(change: Change) -> Iterator[RenderableType]:
    now, tier = change.after, _tier(change)
    states = now.find("outrider_replica_state")
    state = next((labels["state"] for labels, value in states if value), "?")
    queue = "outrider_waiting_rows" if tier == "target" else "outrider_draft_queue"
    yield tier
    yield now.address
    yield Text(state, "green" if state == "ready" else _BAD)
    yield _number(now.total("outrider_open_generations"))
    yield _number(now.total("outrider_idle_sessions"))
    yield f"{now.total('outrider_kv_cache_usage_perc'):.0%}"
    yield _number(now.total(queue))
    yield _number(change.rate("outrider_step_seconds_count"))
    yield _number(change.mean("outrider_batch_rows"))
    yield _number(change.mean("outrider_batch_tokens"))
    yield _time(change.quantile("outrider_step_seconds", 0.5))
    yield _share(
        change.increase("outrider_prefix_cache_hits_total"),
        change.increase("outrider_prefix_cache_queries_total"),
    )


def _number(value: float) -> str:
    if isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _time(seconds: float) -> str:
    if isnan(seconds):
        return "–"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
