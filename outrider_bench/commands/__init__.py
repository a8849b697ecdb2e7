"""`outrider bench …`: one command for each table of docs/benchmarks/results.md.

Each command starts the system it measures, interleaves its variants within one run and prints a
table. It writes NAME.json (settings, machine, versions, results, all samples) and NAME.svg to
`--out`. Only `serve` measures a running system. Commands use the public APIs of the services.

Reading order, in `measuring`: cores, system, workload, load, summary, document, plots, show. Then
the commands, with their helpers in brackets: speed (peer, explain), concurrency, delay, sources
(measuring.tasks), rounds, growth, scaling (trials, busy), signals (bottlenecks, fleet),
shared_draft, overload (overload_phases), attacks (attackers, attack_phases), audit, swap
(swap_load, swap_report), serve (serve_options, serve_report, serve_figures), twin, wire.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# Subcommands in the order of the help text, with the modules that define them.
_MODULES = {
    "speed": "speed",
    "concurrency": "concurrency",
    "delay": "delay",
    "sources": "sources",
    "rounds": "rounds",
    "growth": "growth",
    "scaling": "scaling",
    "overload": "overload",
    "attacks": "attacks",
    "swap": "swap",
    "serve": "serve",
    "signals": "signals",
    "shared-draft": "shared_draft",
    "twin": "twin",
    "wire": "wire",
    "structured": "structured",
    "pair": "pair",
    "explain-gamma": "explain",
    "audit": "audit",
}


class _Subcommands(TyperGroup):
    """Subcommands that are imported when they run, so that `outrider --help` starts fast."""

    def list_commands(self, ctx: Any) -> list[str]:
        self.commands = {name: _command(name) for name in _MODULES}
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        if cmd_name in _MODULES:
            return _command(cmd_name)
        self.list_commands(ctx)  # the error message suggests one of them
        return None


def _command(name: str) -> TyperCommand:
    module = import_module(f"outrider_bench.commands.{_MODULES[name]}")
    alone = typer.Typer(add_completion=False)
    alone.command(name)(getattr(module, name.replace("-", "_")))
    command = typer.main.get_command(alone)
    assert isinstance(command, TyperCommand), "one command, not a group"
    return command


bench = typer.Typer(cls=_Subcommands, help="Benchmarks and load tests.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Benchmarks and load tests."""
