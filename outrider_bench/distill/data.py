"""Rows of a distillation: recorded traffic, or generated from prompts; and held-out rows.

Written to the run's folder as they come. A run that goes on reads them from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider.errors import ConfigError
from outrider.tokenizer import Tokenizer
from outrider_bench.distill.generate import (
    Generate,
    Job,
    batches,
    generate_rows,
    held_out_jobs,
    training_jobs,
)
from outrider_bench.distill.optimise import CtrlC, Interrupted
from outrider_bench.distill.processes import Processes
from outrider_bench.distill.prompts import held_out, read_prompts
from outrider_bench.distill.rows import Row, RowFile, read_traffic, without_leaks
from outrider_bench.distill.settings import DistillSettings

Show = Callable[[str], None]

_HELD_OUT_FILE = "held-out.jsonl"


@dataclass(frozen=True)
class Data:
    """Rows to train on, and held-out rows, on which acceptance is measured."""

    train: list[Row]
    held_out: list[Row]


class Collection:
    """Collects the rows of one distillation in `folder`. Progress lines go to `show`."""

    def __init__(
        self, settings: DistillSettings, folder: Path, processes: Processes, show: Show
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._processes = processes
        self._show = show

    def recorded(self, tokenizer: Tokenizer | None, model_fingerprint: str) -> Data:
        """The rows of `--traffic`, copied first: the recorder goes on writing and deleting."""
        settings, kept = self._settings, RowFile(self._folder / "rows-0.jsonl")
        if self._processes.is_main and not (self._folder / _HELD_OUT_FILE).exists():
            assert settings.traffic is not None, "checked with the settings"
            rows = read_traffic(
                settings.traffic,
                tokenizer="" if tokenizer is None else tokenizer.fingerprint,
                model=model_fingerprint,
                max_prompt_tokens=settings.max_prompt_tokens,
                max_rows=settings.samples,
            )
            train, chosen = held_out(rows, settings.seed)
            train = without_leaks(train, chosen)
            kept.clear()
            kept.append(train)
            RowFile(self._folder / _HELD_OUT_FILE).append(chosen)
            self._show(
                f"{len(rows)} recorded generations: {len(train)} to train on, {len(chosen)} held "
                f"out; {sum(row.top is not None for row in train)} with this target's probabilities"
            )
        self._processes.wait()
        return self._read()

    def generated(
        self, tokenizer: Tokenizer | None, generate: Generate, *, budget_s: float
    ) -> Data:
        """The target's continuations of `--prompts`, until `--samples` or the time limit.

        Each process generates its part. Raises Interrupted after Ctrl-C.
        """
        settings = self._settings
        assert settings.prompts is not None, "checked with the settings"
        prompts = read_prompts(settings.prompts, tokenizer, max_tokens=settings.max_prompt_tokens)
        train, chosen = held_out(prompts, settings.seed)
        self._show(f"{len(prompts)} prompts: {len(train)} to train on, {len(chosen)} held out")
        if self._processes.is_main:
            parts = batches(held_out_jobs(chosen), settings.seed, generate.jobs_at_once)
            self._write("held-out rows", _HELD_OUT_FILE, parts, generate, None)
        jobs = training_jobs(train, settings.temperatures, settings.samples)
        parts = self._processes.share(batches(jobs, settings.seed, generate.jobs_at_once))
        self._write("rows", f"rows-{self._processes.index}.jsonl", parts, generate, budget_s)
        self._processes.wait()
        return self._read()

    def _write(
        self,
        what: str,
        name: str,
        parts: Sequence[Sequence[Job]],
        generate: Generate,
        budget_s: float | None,
    ) -> None:
        """Generates the rows that the file lacks. `budget_s` None: all of them."""
        file = RowFile(self._folder / name)
        num_done, num_rows = len(file.read()), sum(map(len, parts))
        began, num_before = time.monotonic(), num_done
        with CtrlC() as ctrl_c:
            rows = generate_rows(generate, parts, num_done=num_done, seed=self._settings.seed)
            for written in rows:
                file.append(written)
                num_done += len(written)
                took_s = time.monotonic() - began
                each_s = took_s / (num_done - num_before)
                left_s = each_s * (num_rows - num_done)
                if budget_s is not None:
                    left_s = min(left_s, budget_s - took_s)
                self._show(f"{what} {num_done}/{num_rows}, {duration(left_s)} left")
                if ctrl_c.was_pressed:
                    raise Interrupted("rows", num_done)
                if budget_s is not None and took_s >= budget_s:
                    break

    def _read(self) -> Data:
        train = [
            row
            for path in sorted(self._folder.glob("rows-*.jsonl"))
            for row in RowFile(path).read()
            if row.has_output
        ]
        chosen = [row for row in RowFile(self._folder / _HELD_OUT_FILE).read() if row.has_output]
        if not train or not chosen:
            raise ConfigError("no output to train on: the target ends its prompts at once")
        return Data(train, chosen)


def duration(seconds: float) -> str:
    """Minutes or seconds, for people."""
    seconds = max(0.0, seconds)
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
