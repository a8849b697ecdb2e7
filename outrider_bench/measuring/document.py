"""JSON document of a benchmark: command, machine, versions, options, results and raw samples.

Owns the common keys. Each benchmark defines its own results and samples.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import outrider
from outrider.cli.stack_options import MADE_PAIR
from outrider.errors import ConfigError
from outrider_bench.measuring.cores import CoreLayout
from outrider_bench.measuring.system import BenchOptions, System

_PACKAGES = ("outrider", "torch", "transformers", "grpcio", "protobuf", "redis", "numpy", "uvloop")


@dataclass(frozen=True)
class Goal:
    """A goal (`asked`) and the measured value (`got`; None: not measured).

    `is_most`: `asked` is an upper bound; otherwise it is a lower bound.
    """

    text: str
    asked: float
    got: float | None
    is_most: bool = False
    # Size of the `bench pair` that the goal applies to; empty: any pair.
    pair: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.got is None:
            return None
        return self.got <= self.asked if self.is_most else self.got >= self.asked


class Document:
    """JSON document: filled during the measurement, written at its end."""

    def __init__(self, name: str, options: BenchOptions) -> None:
        """`name`: of the benchmark and its files.

        Raises ConfigError if the folder `out` cannot be created.
        """
        self.name = name
        self.results: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.goals: list[Goal] = []
        # Set if a signal or an error ended the measurement; the command raises it after its report.
        self.stopped: Exception | None = None
        self._options = options
        self._about: dict[str, Any] = {}
        self._began = datetime.now(UTC)
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {options.out}: {error.strerror or error}") from error

    @property
    def is_cut(self) -> bool:
        return self.stopped is not None

    @property
    def path(self) -> Path:
        return self._options.out / f"{self.name}.json"

    @property
    def plot_path(self) -> Path:
        return self._options.out / f"{self.name}.svg"

    @property
    def goals_here(self) -> list[Goal]:
        """Goals that apply to this pair; none with `--quick` or after a signal or an error."""
        if self._options.quick or self.is_cut:
            return []
        size = _pair_size(self._options.target)
        return [goal for goal in self.goals if goal.pair in ("", size)]

    def add_goals(self, goals: Callable[[], Iterable[Goal]]) -> None:
        """Adds goals; none after a signal or an error: the measurement is incomplete."""
        if not self.is_cut:
            self.goals += goals()

    def about(self, system: System) -> None:
        """Records the models and the cores."""
        self._about = {"models": dataclasses.asdict(system.info), "cores": _cores(system.layout)}

    def write(self) -> None:
        """Writes the document to `path`."""
        head = {
            "benchmark": self.name,
            "command": shlex.join(["outrider", *sys.argv[1:]]),
            "date": self._began.isoformat(timespec="seconds"),
            "duration_s": round((datetime.now(UTC) - self._began).total_seconds(), 1),
            "git_commit": git_commit(),
            "machine": machine(),
            "versions": versions(),
            "options": {name: _plain(value) for name, value in vars(self._options).items()},
            **self._about,
            "is_cut": self.is_cut,
            "error": None if self.stopped is None else repr(self.stopped),
            "goals": [{**dataclasses.asdict(g), "is_met": g.is_met} for g in self.goals_here],
            "results": self.results,
        }
        text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
        # One line per sample: there are hundreds.
        lines = ",\n    ".join(json.dumps(sample, ensure_ascii=False) for sample in self.samples)
        self.path.write_text(f'{text},\n  "samples": [\n    {lines}\n  ]\n}}\n', "utf-8")


def _pair_size(target: str | None) -> str | None:
    """Size of a pair that `bench pair` made; None for other models."""
    if target is None:
        return None
    try:
        report = json.loads((Path(target).expanduser().parent / MADE_PAIR).read_text("utf-8"))
        return str(report["size"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _cores(layout: CoreLayout) -> dict[str, str]:
    return {name: cores or "any" for name, cores in vars(layout).items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the main dependencies."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of this checkout, with `-dirty` after local changes; None outside a checkout."""
    root = Path(outrider.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def machine() -> dict[str, Any]:
    """Description of this machine for JSON."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "num_cores": os.cpu_count(),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "platform": platform.platform(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def _field(path: Path, name: str) -> str | None:
    """Value of the first line `name: value` in a file of /proc."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), None)
