"""`outrider audit`: evidence for and against exact output, from the orchestrator's audit."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from outrider.cli.options import takes
from outrider.cli.sessions import JsonOptions, send

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

FOUND_STATUS = 1
_SECONDS_A_WEEK = 7 * 86_400.0


@takes(JsonOptions)
def audit(options: JsonOptions) -> None:
    """Show the evidence of an orchestrator's losslessness audit (--audit-share).

    Exit status 1 if a re-run differed by more than rounding, or a test raised an alarm. With API
    keys, single failures are shown for your own sessions only.
    """
    from rich.console import Console

    found = send(options, lambda client: client.audit())
    if options.json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
    else:
        for part in _view(found):
            Console().print(part)
    if found.num_generations.get("mismatch") or any(test.num_alarms for test in found.tests):
        raise typer.Exit(FOUND_STATUS)


def _view(found: Any) -> list[RenderableType]:
    if not found.share:
        return ["The audit is off. Start the orchestrator with --audit-share, for instance 0.01."]
    parts: list[RenderableType] = []
    if found.planted_bias:
        parts.append(
            f"[bold red]A bias of {found.planted_bias:g} is planted (--audit-planted-bias): "
            "sampled outputs are wrong.[/]"
        )
    parts += [f"Audited: {100 * found.share:g}% of the generations.", "", _reruns(found)]
    parts += ["", _compared(found), ""]
    per_week = sum(
        test.false_alarm_probability * _SECONDS_A_WEEK / test.period_s for test in found.tests
    )
    parts += [
        f"Tests of sampled verification (together at most {per_week:.2g} false alarms a week):",
        _tests(found),
    ]
    parts += [
        f"Acceptance that is 1 % too frequent would raise an alarm after about "
        f"{test.expected_trials:,.0f} draft tokens."
        for test in found.tests
        if test.expected_trials
    ]
    if found.failures:
        parts += ["", "Failures, latest first:", _failures(found)]
    return parts


def _table(*names: str) -> Table:
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def _reruns(found: Any) -> Table:
    table = _table("re-runs without drafts", "generations")
    for name, label in (
        ("same", "same output"),
        ("near_tie", "near tie"),
        ("mismatch", "mismatch"),
    ):
        style = "bold red" if name == "mismatch" and found.num_generations.get(name) else ""
        table.add_row(label, f"{found.num_generations.get(name, 0):,}", style=style)
    for reason, num in sorted(found.num_dropped.items()):
        if num:
            table.add_row(f"dropped: {reason.replace('_', ' ')}", f"{num:,}", style="dim")
    return table


def _compared(found: Any) -> str:
    gap = f", up to {found.max_gap:.2g} logits" if found.num_near_ties else ""
    return (
        f"{found.num_tokens:,} tokens compared. Near ties: {found.num_near_ties:,}{gap}. "
        f"Up to {found.tolerance:g} logits count as rounding."
    )


def _tests(found: Any) -> Table:
    table = _table("test", "trials", "observed", "expected", "evidence", "alarm at", "alarms")
    for test in found.tests:
        table.add_row(
            test.name,
            f"{test.num_trials:,}",
            f"{test.observed:.4f}",
            f"{test.expected:.4f}",
            _factor(test.max_log_evidence),
            _factor(test.alarm_log_evidence),
            str(test.num_alarms),
            style="bold red" if test.num_alarms else "",
        )
    return table


def _factor(log_evidence: float) -> str:
    """Evidence as a factor; beyond a million as a power of ten."""
    if log_evidence < math.log(1e6):
        return f"{math.exp(log_evidence):,.1f}"
    return f"1e{log_evidence / math.log(10):.0f}"


def _failures(found: Any) -> Table:
    table = _table(
        "time", "session", "method", "token", "gap", "differing", "replicas", "re-run at"
    )
    for failure in found.failures:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(failure.time_s))
        token = f"{failure.index - failure.prompt_len}"
        if failure.token_id is not None:
            expected = "?" if failure.expected_id is None else failure.expected_id
            token += f": {failure.token_id} for {expected}"
        table.add_row(
            at,
            failure.session_id,
            failure.verification,
            token,
            f"{failure.gap:.3g}",
            str(failure.num_differing_tokens),
            ", ".join(failure.replicas),
            failure.rerun_replica,
        )
    return table
