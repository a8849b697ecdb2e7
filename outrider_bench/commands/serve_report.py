"""Report of `outrider bench serve`: terminal tables, JSON and HTML page."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.errors import CallFailed, ConfigError
from outrider_bench.commands.serve_options import OFF, ON, ServeOptions, load_pattern
from outrider_bench.loadtest.campaign import Campaign
from outrider_bench.loadtest.measures import Summary
from outrider_bench.loadtest.phase_results import PhaseResult
from outrider_bench.loadtest.results import (
    own_shape,
    probe_shape,
    sample,
    speed_up,
    summary_of,
    vllm_shape,
)
from outrider_bench.loadtest.slo import Slo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# If requests are sent later than this (p99), the load generator lacks CPU.
_LATE_S = 0.02


def report(
    options: ServeOptions, campaign: Campaign, slo: Slo | None, console: Console, *, is_cut: bool
) -> None:
    """Writes the files and prints the tables. Raises CallFailed if a variant had no response."""
    by_variant = {name: _reported_results(campaign, name) for name in (ON, OFF)}
    summaries = {name: summary_of(results, slo) for name, results in by_variant.items() if results}
    document = _document(options, campaign, slo, by_variant, summaries, is_cut)
    path = options.out / f"{options.name}.json"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if is_cut:
        console.print("[yellow]stopped early: these are the results so far[/]")
    if summaries:
        console.print(_table(summaries))
        console.print()
    for line in (*_failures(by_variant, summaries), *_remarks(document, summaries)):
        console.print(line, highlight=False)
    _print_path(path, console)
    if options.html:
        _write_page(options, campaign, document, by_variant, console)
    unanswered = [name for name, summary in summaries.items() if not summary.num_completed]
    if unanswered and not is_cut:
        raise CallFailed(f"{' and '.join(unanswered)}: no request was answered")


def _print_path(path: Path, console: Console) -> None:
    console.print(str(path), style="dim", soft_wrap=True, highlight=False, markup=False)


def _failures(
    by_variant: dict[str, list[PhaseResult]], summaries: dict[str, Summary]
) -> Iterator[str]:
    """Lines with the count of each error status and the detail of its first occurrence."""
    from rich.markup import escape

    for name, summary in summaries.items():
        records = [record for result in by_variant[name] for record in result.records]
        for status, num in sorted(summary.errors.items()):
            detail = next(record.detail for record in records if record.status == status)
            yield f"[red]{name}: {num} × {status}: {escape(detail)}[/]"


def _reported_results(campaign: Campaign, variant: str) -> list[PhaseResult]:
    """Phase results of a variant to report.

    For a search: the highest rate that passed, otherwise the last rate tried.
    """
    if not campaign.probes:
        return [s for s in campaign.all_results if s.variant == variant and s.records]
    own = [probe for probe in campaign.probes if probe.variant == variant]
    passed = [probe for probe in own if probe.has_passed]
    best = max(passed, key=lambda probe: probe.rate) if passed else own[-1] if own else None
    return [best.result] if best is not None else []


def _document(
    options: ServeOptions,
    campaign: Campaign,
    slo: Slo | None,
    by_variant: dict[str, list[PhaseResult]],
    summaries: dict[str, Summary],
    is_cut: bool,
) -> dict[str, Any]:
    """JSON document: vLLM's keys for the runs with speculation; all other keys under `outrider`."""

    def shape(name: str) -> dict[str, Any]:
        if name not in summaries:
            return {}
        return vllm_shape(summaries[name], by_variant[name], is_detailed=options.detailed)

    own: dict[str, Any] = _environment(options, campaign, is_cut)
    if ON in summaries:
        own |= own_shape(summaries[ON], by_variant[ON])
    if OFF in summaries:
        own["speculation_off"] = shape(OFF) | {
            "outrider": own_shape(summaries[OFF], by_variant[OFF])
        }
    if len(summaries) == 2 and not campaign.probes:  # variants of a search run at different rates
        own["speed_up"] = speed_up(summaries[ON], summaries[OFF])
    if slo is not None:
        own["slo"] = vars(slo)
    if campaign.probes:
        assert slo is not None, "checked"
        own["sweep"] = {
            "highest_rate": {name: found.rate for name, found in campaign.searches.items()},
            "lowest_failing_rate": {name: found.bound for name, found in campaign.searches.items()},
            "probes": [probe_shape(probe, slo) for probe in campaign.probes],
        }
    own["samples"] = [
        {"variant": result.variant, "repetition": result.repetition} | sample(record)
        for results in by_variant.values()
        for result in results
        for record in result.records
    ]
    return _head(options, campaign, by_variant) | shape(ON) | {"outrider": own}


def _head(
    options: ServeOptions, campaign: Campaign, by_variant: dict[str, list[PhaseResult]]
) -> dict[str, Any]:
    """The first keys of the JSON that `vllm bench serve` writes."""
    rates = [result.rate for result in by_variant[ON] if result.rate is not None]
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": _endpoint_type(options),
        "backend": "outrider",
        "label": options.label,
        "model_id": campaign.orchestrators.info.target.name,
        "tokenizer_id": None,
        "num_prompts": sum(len(result.records) for result in by_variant[ON]),
        "request_rate": rates[0] if rates else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": load_pattern(options).num_clients,
    }


def _endpoint_type(options: ServeOptions) -> str:
    """As `vllm bench serve` names HTTP's endpoints."""
    if options.http is None:
        return "outrider"
    return "openai-chat" if options.chat else "openai"


def _environment(options: ServeOptions, campaign: Campaign, is_cut: bool) -> dict[str, Any]:
    from outrider.client import Models
    from outrider.client.messages import read_message
    from outrider_bench.measuring.document import git_commit, machine, versions

    return {
        "command": shlex.join(["outrider", *sys.argv[1:]]),
        "options": {k: None if v is None else str(v) for k, v in vars(options).items()},
        "models": asdict(read_message(Models, campaign.orchestrators.info)),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "is_cut": is_cut,
    }


def _table(summaries: dict[str, Summary]) -> Table:
    from outrider_bench.measuring import show

    names = [name for name in (ON, OFF) if name in summaries]
    shown = show.table("measured by the clients", ("", *names))
    own = [summaries[name] for name in names]

    def row(title: str, texts: Sequence[str], *, ends: bool = False) -> None:
        shown.add_row(title, *texts, end_section=ends)

    row("requests answered", [f"{s.num_completed} of {s.num_requests}" for s in own])
    row("requests/s", [show.number(s.requests_per_s) for s in own])
    row("tokens/s", [show.number(s.tokens_per_s, 1) for s in own])
    if own[0].attained is not None:
        row("met the SLO", [show.share(s.attained) for s in own])
        row("goodput, requests/s", [show.number(s.goodput_per_s) for s in own])
    row("", ["" for _ in own], ends=True)
    for name, title in (
        ("ttft", "TTFT"), ("tpot", "TPOT"), ("itl_chunk", "ITL per message"),
        ("itl_token", "ITL per token"), ("e2e", "end-to-end"),
    ):  # fmt: skip
        found = [getattr(s.latencies, name) for s in own]
        texts = [
            "" if d is None else " · ".join(f"{1e3 * v:.1f}" for v in d.percentiles.values())
            for d in found
        ]
        row(f"{title}, ms: p50 · p90 · p95 · p99", texts, ends=name == "e2e")

    def drafted(name: str) -> list[float | None]:
        return [getattr(s.drafting, name) if s.drafting is not None else None for s in own]

    row("α, acceptance rate", [show.share(v) for v in drafted("alpha")])
    row("τ, tokens per drafted round", [show.number(v) for v in drafted("tau")])
    row("γ, draft tokens per round", [show.number(v, 1) for v in drafted("mean_gamma")])
    row("look-ahead hits", [show.share(v) for v in drafted("hit_rate")])
    return shown


def _remarks(document: dict[str, Any], summaries: dict[str, Summary]) -> list[str]:
    """Warnings and further results."""
    own, lines = document["outrider"], []
    for name, summary in summaries.items():
        if summary.lateness is not None and summary.lateness.p99 > _LATE_S:
            lines.append(
                f"[yellow]{name}: requests were sent up to {1e3 * summary.lateness.p99:.0f} ms late"
                " (p99): this load generator lacks CPU; the delay counts as latency[/]"
            )
    if batch := own.get("verify_batch"):
        rows = batch["rows"]
        if rows is not None:
            lines.append(
                f"verify requests per target pass: {rows:.1f}, reported by the {batch['source']}"
            )
    if gains := own.get("speed_up"):
        ratios = {k: f"{v:.2f}×" for k, v in gains.items() if v is not None}
        lines.append("speed-up: " + ", ".join(f"{name} {text}" for name, text in ratios.items()))
    for name, rate in own.get("sweep", {}).get("highest_rate", {}).items():
        text = (
            "no rate met the SLO" if rate is None else f"meets the SLO up to {rate:.3g} requests/s"
        )
        lines.append(f"[bold]{name}: {text}[/]")
    return lines


def _write_page(
    options: ServeOptions,
    campaign: Campaign,
    document: dict[str, Any],
    by_variant: dict[str, list[PhaseResult]],
    console: Console,
) -> None:
    from outrider_bench.commands.serve_figures import figures
    from outrider_bench.loadtest.page import page

    drawn: list[tuple[str, str]] = []
    try:
        drawn = figures(by_variant, campaign.probes, options.attain)
    except ConfigError as error:  # without matplotlib, the page has no plots
        console.print(f"no plots: {error}", style="yellow", highlight=False, markup=False)
    path = options.out / f"{options.name}.html"
    path.write_text(page(document, drawn), "utf-8")
    _print_path(path, console)
