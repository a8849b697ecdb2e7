"""`outrider bench …`: one command for each table of docs/benchmarks.md.

Each command starts the system it measures, runs its variants in turn within one run, prints a
table, and writes NAME.json (settings, machine, versions, results, every raw sample) and NAME.svg
under `--out`. Knows the services as any caller does.

Reading order: cores, system, workload, load, summary, document, plots, show; then the commands:
speed (peer, explain), concurrency, delay, rounds (process), growth, scaling (trials, busy),
signals (bottlenecks, fleet), overload (crowd), attacks
(attackers), serve (serve_options, serve_report, serve_figures),
twin, wire.
"""

from __future__ import annotations

import typer

from outrider.cli.bench.attacks import attacks
from outrider.cli.bench.concurrency import concurrency
from outrider.cli.bench.delay import delay
from outrider.cli.bench.explain import explain_gamma
from outrider.cli.bench.growth import growth
from outrider.cli.bench.overload import overload
from outrider.cli.bench.rounds import rounds
from outrider.cli.bench.scaling import scaling
from outrider.cli.bench.serve import serve
from outrider.cli.bench.signals import signals
from outrider.cli.bench.speed import speed
from outrider.cli.bench.twin import twin
from outrider.cli.bench.wire import wire
from outrider.cli.pair import pair

bench = typer.Typer(help="Measure.", no_args_is_help=True)
for command in (
    speed,
    concurrency,
    delay,
    rounds,
    growth,
    scaling,
    overload,
    attacks,
    serve,
    signals,
    twin,
    wire,
    pair,
):
    bench.command()(command)
bench.command("explain-gamma")(explain_gamma)
