"""HTML page of a load test: figures, tables and plots; fetches nothing. Pure.

Its input is the document written to JSON; plots are SVG text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

_TIMES = (
    ("ttft", "Time to first token"),
    ("tpot", "Time per output token"),
    ("itl_chunk", "Inter-token latency, per message"),
    ("itl_token", "Inter-token latency, per token"),
    ("e2e", "End-to-end"),
)
_PERCENTILES = ("p50", "p90", "p95", "p99")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Load test: {{ document.model_id }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff;
         margin: 2rem auto; max-width: 68rem; padding: 0 1.5rem; }
  h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
  .dim { color: #666; } .bad { color: #b3261e; } code { font-size: .88em; }
  .cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
  .card { border: 1px solid #e3e3e3; border-radius: 8px; padding: .6rem 1rem; min-width: 8.5rem; }
  .card b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid #ececec; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  thead th { font-weight: 600; border-bottom: 2px solid #ccc; }
  figure { margin: .5rem 0 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Load test of {{ document.model_id }}</h1>
<div class="dim">{{ own.options.endpoint }} · {{ document.date }} · {{ load }}
{%- if own.is_cut %} · <span class="bad">cut short</span>{% endif %}</div>
<div class="cards">
{%- for name, value, note in cards %}
  <div class="card">{{ name }}<b>{{ value }}</b><span class="dim">{{ note }}</span></div>
{%- endfor %}
</div>
<h2>Latencies, milliseconds</h2>
<div class="scroll"><table>
<thead><tr><th></th><th></th><th>mean</th>
{%- for p in percentiles %}<th>{{ p }}</th>{% endfor %}<th>samples</th></tr></thead>
<tbody>
{%- for title, rows in times %}{% for variant, found in rows %}
<tr><td>{{ title if loop.first else "" }}</td><td>{{ variant }}</td>
<td>{{ ms(found.mean) }}</td>
{%- for p in percentiles %}<td>{{ ms(found[p]) }}</td>{% endfor %}<td>{{ found.num }}</td></tr>
{%- endfor %}{% endfor %}
</tbody></table></div>
<p class="dim">Answered requests only. Times count from the intended send time: a request sent late
has waited too. A message carries the tokens of a round. Latency per token: the gap before
a message, divided by its number of tokens.</p>
<h2>Requests</h2>
<div class="scroll"><table>
<thead><tr><th></th><th>answered</th><th>requests/s</th><th>tokens/s</th><th>met the SLO</th>
<th>goodput/s</th><th>not answered</th></tr></thead>
<tbody>
{%- for variant, shape, mine in variants %}
<tr><td>{{ variant }}</td><td>{{ shape.completed }}</td>
<td>{{ "%.2f" | format(shape.request_throughput) }}</td>
<td>{{ "%.1f" | format(shape.output_throughput) }}</td>
<td>{{ "" if mine.slo_attained is none else "%.1f %%" | format(100 * mine.slo_attained) }}</td>
<td>{{ "" if shape.request_goodput is none else "%.2f" | format(shape.request_goodput) }}</td>
<td{% if mine.errors_by_status %} class="bad"{% endif %}>
{%- for status, num in mine.errors_by_status.items() %}{{ num }} × {{ status }} {% else %}0
{%- endfor %}{% if mine.num_cut %} ({{ mine.num_cut }} cut off){% endif %}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- for title, drawing in figures %}
<h2>{{ title }}</h2>
<figure>{{ drawing }}</figure>
{%- else %}
<p class="dim">No plots: matplotlib is not installed, or no request was answered.</p>
{%- endfor %}
<h2>Command and machine</h2>
<p><code>{{ own.command }}</code></p>
<p class="dim">{{ own.machine.cpu }}, {{ own.machine.num_cores }} cores, {{ own.machine.platform }};
{% for name, version in own.versions.items() %}{{ name }} {{ version }}
{%- if not loop.last %}, {% endif %}{% endfor %}
{%- if own.git_commit %}; commit {{ own.git_commit }}{% endif %}. The load generator sent its
requests {{ ms(own.send_lateness_s.p99) if own.send_lateness_s else "?" }} ms late at p99.</p>
</body>
</html>
"""


def page(document: dict[str, Any], figures: Sequence[tuple[str, str]]) -> str:
    """The HTML page. `document`: as written to JSON; `figures`: titles and SVG."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    own = document["outrider"]
    variants = [("speculation", document, own)] if "completed" in document else []
    if off := own.get("speculation_off"):
        variants.append(("off", off, off["outrider"]))
    return environment.from_string(_PAGE).render(
        document=document,
        own=own | {"send_lateness_s": own.get("send_lateness_s")},
        load=_load(document),
        cards=_cards(document),
        variants=variants,
        times=_times(variants),
        percentiles=_PERCENTILES,
        # matplotlib's SVG: valid HTML from its first tag on.
        figures=[(title, Markup(drawing[drawing.index("<svg") :])) for title, drawing in figures],
        ms=lambda seconds: f"{1e3 * seconds:.1f}",
    )


def _times(
    variants: Sequence[tuple[str, dict[str, Any], dict[str, Any]]],
) -> list[tuple[str, list[tuple[str, dict[str, float]]]]]:
    rows = []
    for name, title in _TIMES:
        found = [(variant, own["latencies_s"][name]) for variant, _, own in variants]
        known = [(variant, times) for variant, times in found if times is not None]
        if known:
            rows.append((title, known))
    return rows


def _load(document: dict[str, Any]) -> str:
    options = document["outrider"]["options"]
    if document["max_concurrency"] is not None:
        return f"closed loop, {document['max_concurrency']} clients"
    if document["request_rate"] == "inf":
        return f"trace {options['trace']}"
    burstiness = document["burstiness"]
    kind = "Poisson" if burstiness == 1 else f"gamma gaps of shape {burstiness:g}"
    return f"open loop, {document['request_rate']:.3g} requests/s ({kind})"


def _cards(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The most important figures: (name, value, note)."""
    own = document["outrider"]
    gains, drafting = own.get("speed_up") or {}, own.get("drafting") or {}
    cards = [
        ("Output", document.get("output_throughput"), "{:.1f}", "tokens/s"),
        ("Speed-up", gains.get("tokens_per_s"), "{:.2f}×", "tokens/s over speculation off"),
        ("Speed-up", gains.get("tpot_p50"), "{:.2f}×", "time per token, p50"),
        ("Acceptance α", drafting.get("alpha"), "{:.0%}", "of verified draft tokens"),
        ("τ", drafting.get("tau"), "{:.2f}", "tokens per round with a draft"),
        ("Verify batch", (own.get("verify_batch") or {}).get("rows"), "{:.1f}", "rows per pass"),
        ("SLO met", own.get("slo_attained"), "{:.1%}", "of requests"),
    ]
    for name, rate in (own.get("sweep") or {}).get("highest_rate", {}).items():
        cards.append((f"Highest rate, {name}", rate, "{:.3g}/s", "that meets the SLO"))
    return [(name, form.format(v), note) for name, v, form, note in cards if v is not None]
