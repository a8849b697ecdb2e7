"""`outrider bench …`: one command for each table of docs/benchmarks/results.md.

Each command starts the system it measures, interleaves its variants within one run and prints a
table. It writes NAME.json (settings, machine, versions, results, all samples) and NAME.svg to
`--out`. Only `serve` measures a running system. Commands use the public APIs of the services.

Reading order, in `measuring`: cores, system, workload, load, summary, document, plots, show. Then
the commands, with their helpers in brackets: speed (peer, explain), concurrency, delay, rounds,
growth, scaling (trials, busy), signals (bottlenecks, fleet), overload (overload_phases), attacks
(attackers, attack_phases), serve (serve_options, serve_report, serve_figures), twin, wire.
"""

from __future__ import annotations

import typer

from outrider_bench.commands.attacks import attacks
from outrider_bench.commands.concurrency import concurrency
from outrider_bench.commands.delay import delay
from outrider_bench.commands.explain import explain_gamma
from outrider_bench.commands.growth import growth
from outrider_bench.commands.overload import overload
from outrider_bench.commands.pair import pair
from outrider_bench.commands.rounds import rounds
from outrider_bench.commands.scaling import scaling
from outrider_bench.commands.serve import serve
from outrider_bench.commands.signals import signals
from outrider_bench.commands.speed import speed
from outrider_bench.commands.twin import twin
from outrider_bench.commands.wire import wire

bench = typer.Typer(help="Benchmarks and load tests.", no_args_is_help=True)
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
