"""Writes deploy/components/monitoring/dashboard.json, the Grafana dashboard.

`--check` exits with status 1 if the file is out of date. Metric names are those of
outrider/telemetry/catalogue.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent.parent / "deploy/components/monitoring/dashboard.json"
COLUMNS = 24
HEIGHT = 8
PER_ROW = 3
_HERE = '{namespace="$namespace"}'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One time series panel. `queries`: legend and PromQL; `why`: its description."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    why: str = ""
    top: float | None = None


def _quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    where = f'{{namespace="$namespace"{by}}}'
    return tuple(
        (
            f"p{quantile}",
            f"histogram_quantile(0.{quantile}, sum by (le) "
            f"(rate(outrider_{metric}_bucket{where}[$__rate_interval])))",
        )
        for quantile in ("50", "90", "99")
    )


def _rate(metric: str, by: str = "", where: str = "") -> str:
    group = f" by ({by})" if by else ""
    return (
        f'sum{group} (rate(outrider_{metric}{{namespace="$namespace"{where}}}[$__rate_interval]))'
    )


def _increase(metric: str, by: str) -> str:
    return _rate(metric, by).replace("(rate(", "(increase(")


def _ratio(above: str, below: str) -> str:
    return f"{above} / {below}"


_ACCEPTED = _rate("spec_decode_num_accepted_tokens_total")
_REJECTED = _rate("spec_decode_num_rejected_tokens_total")
_OF_REVISION, _REJECTED_OF_REVISION = (
    _rate(f"draft_revision_{what}_tokens_total", "revision") for what in ("accepted", "rejected")
)
_ALPHA_BY_REVISION = _ratio(_OF_REVISION, f"({_OF_REVISION} + {_REJECTED_OF_REVISION})")
_OF_SOURCE = _rate("draft_source_tokens_total", "source")
_ALPHA_BY_SOURCE = _ratio(
    _rate("draft_source_tokens_total", "source", ',outcome="accepted"'), _OF_SOURCE
)
_TARGET = "target, fingerprint"
_DRAFTS = _rate("spec_decode_num_drafts_total")

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Client side",
        (
            Panel("Time to first token", _quantiles("time_to_first_token_seconds"), "s"),
            Panel(
                "Between chunks (ITL)",
                _quantiles("inter_token_latency_seconds"),
                "s",
                "From one chunk to the next; a chunk may have several tokens.",
            ),
            Panel("Per output token", _quantiles("request_time_per_output_token_seconds"), "s"),
            Panel("Tokens per second", (("{{origin}}", _rate("tokens_total", "origin")),), "short",
                  "By origin; accepted tokens are the draft's."),
            Panel("Calls by status", (("{{status}}", _rate("requests_total", "status")),), "reqps"),
            Panel("Streams", (
                ("running {{pod}}", f"sum by (pod) (outrider_num_requests_running{_HERE})"),
                ("waiting {{pod}}", f"sum by (pod) (outrider_num_requests_waiting{_HERE})"),
            )),
        ),
    ),
    (
        "Speculation",
        (
            Panel("Acceptance α by draft revision", (("{{revision}}", _ALPHA_BY_REVISION),),
                  "percentunit", "Which revision generations use: outrider drafts list.", 1.0),
            Panel("Acceptance α", (("α", _ratio(_ACCEPTED, f"({_ACCEPTED} + {_REJECTED})")),),
                  "percentunit", "accepted / (accepted + rejected); excellent from 0.7.", 1.0),
            Panel("Tokens per round τ", (("τ", f"1 + {_ratio(_ACCEPTED, _DRAFTS)}"),)),
            Panel("Draft tokens per round γ", (
                ("last choice", f"avg (outrider_gamma{_HERE})"),
                ("γ = {{gamma}}, rounds/s", _rate("rounds_total", "gamma")),
            )),
            Panel("Look-ahead hits", (
                ("all rounds", _ratio(_rate("lookahead_rounds_total", where=',outcome="hit"'),
                                         _rate("lookahead_rounds_total"))),
                ("recent", f"avg (outrider_lookahead_hit_rate{_HERE})"),
            ), "percentunit", "Proposals that were ready when the verify result arrived.", 1.0),
            Panel("Acceptance by position", ((
                "{{position}}",
                _ratio(_rate("spec_decode_num_accepted_tokens_per_pos_total", "position"),
                       f"on () group_left () {_DRAFTS}"),
            ),), "percentunit", "", 1.0),
            Panel("Wait for a proposal", _quantiles("draft_round_trip_seconds"), "s"),
            Panel("Rounds by draft source", (
                ("{{source}}, {{reason}}", _rate("draft_source_rounds_total", "source, reason")),
            ), "short", "What the router chose: model, lookup or none, and why."),
            Panel("Acceptance α by draft source", (("{{source}}", _ALPHA_BY_SOURCE),),
                  "percentunit", "", 1.0),
        ),
    ),
    (
        "Target tier",
        (
            Panel("KV cache in use", (("{{pod}}", "max by (pod) (outrider_kv_cache_usage_perc"
                                      '{namespace="$namespace",tier="target"})'),),
                  "percentunit", "", 1.0),
            Panel("Waiting verify requests", (
                ("{{pod}}", f"sum by (pod) (outrider_waiting_rows{_HERE})"),)),
            Panel("Queue time", _quantiles("request_queue_time_seconds"), "s",
                  "From the call to its first verify request."),
            Panel("Sequences per pass", _quantiles("batch_rows", ',tier="target"')),
            Panel("Tokens per pass", _quantiles("batch_tokens", ',tier="target"')),
            Panel("Pass duration", _quantiles("step_seconds", ',tier="target"'), "s"),
        ),
    ),
    (
        "Draft tier",
        (
            Panel("Queue", (("{{pod}}", f"sum by (pod) (outrider_draft_queue{_HERE})"),), "short",
                  "Generations that wait for draft tokens."),
            Panel("Sequences per step", _quantiles("batch_rows", ',tier="draft"')),
            Panel("Step duration", _quantiles("step_seconds", ',tier="draft"'), "s"),
            Panel("Tokens per second by target", (
                ("{{target}} {{fingerprint}}", _rate("draft_target_tokens_total", _TARGET)),
            ), "short", "Tokens run for each target: context and draft tokens."),
            Panel("Generations by target", (
                ("{{target}} open", f"sum by (target) (outrider_draft_target_generations{_HERE})"),
                ("{{target}} waiting", f"sum by (target) (outrider_draft_target_queue{_HERE})"),
            )),
            Panel("Agreement by target", (
                ("{{target}} {{fingerprint}}",
                 _ratio(_rate("draft_target_agreed_tokens_total", _TARGET),
                        _rate("draft_target_compared_tokens_total", _TARGET))),
            ), "percentunit", "Draft tokens equal to the committed ones; the draft's own count.",
                1.0),
        ),
    ),
    (
        "Audit and recorded traffic",
        (
            Panel("Audited generations", (
                ("{{outcome}}", _rate("audited_generations_total", "outcome")),
                ("not re-run: {{reason}}", _rate("audits_dropped_total", "reason")),
            ), "short", "A mismatch is a defect; near ties differ by rounding only."),
            Panel("Evidence against exact verification", (
                ("{{test}}", f"max by (test) (outrider_audit_log_evidence{_HERE})"),
                ("alarms: {{test}}", _increase("audit_alarms_total", "test")),
            ), "short", "Logarithm, by test of sampled verification; outrider audit explains it."),
            Panel("Recorded generations", (
                ("{{outcome}}", _rate("traffic_records_total", "outcome")),
            ), "short", "Of traffic_dir; dropped: writing was too slow or failed."),
        ),
    ),
    (
        "Replicas, Redis, failures",
        (
            Panel("Replicas by state, as orchestrators see them", (
                ("{{tier}} {{state}}", f"max by (tier, state) (outrider_replicas{_HERE})"),)),
            Panel("Redis reachable", (("{{pod}}", f"min by (pod) (outrider_redis_up{_HERE})"),)),
            Panel("Failures and preemptions", (
                ("{{tier}} {{reason}}", _rate("failures_total", "tier, reason")),
                ("preempted", _rate("num_preemptions_total")),
            )),
            Panel("Rejected by access checks or capacity", (
                ("{{reason}}", _rate("calls_refused_total", "reason")),), "reqps",
                "By reason: no_key, unknown_key, over_limit, identity, queue_full …"),
        ),
    ),
)  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.why,
        "datasource": _SOURCE,
        "gridPos": {"h": HEIGHT, "w": COLUMNS // PER_ROW, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries)
        ],
    }


def _panels() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS:
        made.append({
            "id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
        })  # fmt: skip
        y += 1
        for i, panel in enumerate(panels):
            x = (i % PER_ROW) * (COLUMNS // PER_ROW)
            made.append(_panel(panel, len(made) + 1, x, y + (i // PER_ROW) * HEIGHT))
        y += -(-len(panels) // PER_ROW) * HEIGHT
    return made


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "namespace",
            "type": "query",
            "datasource": _SOURCE,
            "query": "label_values(outrider_num_requests_running, namespace)",
            "refresh": 2,
        },
    ]


def dashboard() -> str:
    """Content of the file."""
    made = {
        "uid": "outrider",
        "title": "Outrider",
        "tags": ["outrider", "llm"],
        "schemaVersion": 39,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "15s",
        "templating": {"list": _variables()},
        "panels": _panels(),
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    if parser.parse_args().check:
        return 0 if PATH.read_text("utf-8") == dashboard() else 1
    PATH.write_text(dashboard(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
