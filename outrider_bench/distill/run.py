"""Distillation of a draft: data, acceptance before, training, acceptance after, files.

Owns the order of the work, what is stored in between, and the decision to write the draft. A run
that was interrupted or killed goes on with the same settings: its state is in `out/distillation`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outrider.engine.loading import checkpoint
from outrider.errors import ConfigError
from outrider_bench.distill.acceptance import Acceptance, measure_acceptance, worse
from outrider_bench.distill.checkpoint import Checkpoint
from outrider_bench.distill.data import Collection, Data, duration
from outrider_bench.distill.generate import OwnTarget, RunningService
from outrider_bench.distill.losses import LOSSES
from outrider_bench.distill.models import (
    check_context,
    common_tokenizer,
    common_vocab_size,
    first_layers,
    load_draft,
    load_target,
    rounded,
    stored_dtype,
    write_draft,
)
from outrider_bench.distill.optimise import (
    Interrupted,
    Limits,
    Optimiser,
    Position,
    TrainingEvent,
)
from outrider_bench.distill.processes import Processes
from outrider_bench.distill.rows import Batch, shuffled_batch
from outrider_bench.distill.settings import DistillSettings
from outrider_bench.distill.target_cache import TargetCache
from outrider_bench.distill.train import train_draft

REPORT = "distillation.json"
_STATE = "distillation"
# Share of `minutes` for generating rows; the rest is for training.
_GENERATION_SHARE = 0.25
_MINUTE_S = 60.0
# Muon's rate for matrices, relative to AdamW's: as for the quickstart draft.
_MATRIX_RATE = 4.0

Show = Callable[[str], None]


@dataclass(frozen=True)
class DistillReport:
    """What a distillation did. `refused`: why no draft was written; None: it was.

    `is_cut`: Ctrl-C ended the training; nothing was written, and the same call goes on. `after` is
    of the weights as stored. `is_main`: whether this process of several reports.
    """

    before: Acceptance
    after: Acceptance
    num_rows: int
    num_steps: int
    training_s: float
    refused: str | None = None
    is_cut: bool = False
    is_main: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rates without the rows."""
        return {
            "before": self.before.summary(),
            "after": self.after.summary(),
            "num_held_out_positions": self.before.num_positions,
            "num_rows": self.num_rows,
            "num_steps": self.num_steps,
            "training_s": round(self.training_s, 1),
            "refused": self.refused,
            "is_cut": self.is_cut,
        }


def distill(settings: DistillSettings, show: Show = lambda line: None) -> DistillReport | None:
    """Runs or continues a distillation, and writes the draft to `settings.out` if it is not worse.

    Returns None after Ctrl-C while rows were generated. `show` receives progress, and the result in
    words, in the main process. Call it on the main thread: it handles Ctrl-C. Raises ConfigError
    and ModelError; CallFailed of a service.
    """
    settings.check()
    processes = Processes(settings.device)
    show = show if processes.is_main else lambda line: None
    try:
        report = _Run(settings, processes, show).run()
    except Interrupted as error:
        show(f"stopped after {error.num_steps} rows; the same command goes on")
        return None
    finally:
        processes.close()
    show(_result(report, settings.out))
    return report


def _result(report: DistillReport, out: Path) -> str:
    if report.is_cut:
        return (
            f"stopped after {report.num_steps} steps; no draft was written, the same command goes "
            "on"
        )
    if report.refused is not None:
        return (
            f"no draft was written: {report.refused}. Its state is kept: the same command with "
            "more --minutes or --steps goes on"
        )
    return f"wrote {out}; serve it with: outrider up --draft {out}"


class _Run:
    def __init__(self, settings: DistillSettings, processes: Processes, show: Show) -> None:
        self._settings = settings
        self._processes = processes
        self._show = show
        self._folder = settings.out / _STATE
        self._checkpoint = Checkpoint(self._folder / "checkpoint.pt")

    def run(self) -> DistillReport:
        settings = self._settings
        self._claim_folder()
        tokenizer = common_tokenizer(settings.target, settings.draft)
        target = load_target(settings.target, self._processes.device)
        if settings.draft is not None:
            draft = load_draft(settings.draft, self._processes.device)
        else:
            assert settings.from_layers is not None, "checked with the settings"
            draft = first_layers(target, settings.from_layers)
        if self._processes.device.type == "cpu":
            # PyTorch's fused attention is slow to differentiate there: 126 ms of CPU per step of
            # the quickstart draft, with it 186 ms.
            draft.set_attn_implementation("eager")
        longest = settings.max_prompt_tokens + settings.max_tokens
        check_context(target, settings.target, longest)
        check_context(draft, settings.draft or "the draft", longest)
        dtype = stored_dtype(target, settings.draft or settings.target)
        self._show(_described(target, draft))
        collection = Collection(settings, self._folder, self._processes, self._show)
        if settings.traffic is not None:
            data = collection.recorded(tokenizer, checkpoint.fingerprint(target))
        else:
            generate = self._generator(target)
            data = collection.generated(tokenizer, generate, budget_s=self._budget_s(True))
        before = self._before(target, draft, data)
        try:
            position = self._train(target, draft, data)
            is_cut = False
        except Interrupted as error:
            position, is_cut = Position(error.num_steps), True
        draft = rounded(draft, dtype)
        after = measure_acceptance(target, draft, data.held_out)
        self._show(f"after:  {_rates(after)}")
        refused = worse(before, after)
        report = DistillReport(
            before,
            after,
            num_rows=len(data.train),
            num_steps=position.num_steps,
            training_s=position.elapsed_s,
            refused=refused,
            is_cut=is_cut,
            is_main=self._processes.is_main,
        )
        if self._processes.is_main and not is_cut and refused is None:
            self._write(draft, dtype, report)
        self._processes.wait()
        return report

    def _claim_folder(self) -> None:
        """Stores the settings, or compares them with those of the run to go on with."""
        path, identity = self._folder / "settings.json", self._settings.identity()
        if path.exists():
            earlier = json.loads(path.read_text("utf-8"))
            changed = [name for name in identity if earlier.get(name) != identity[name]]
            if changed:
                names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
                raise ConfigError(
                    f"--out: {self._settings.out} has an unfinished distillation with another "
                    f"{names}; go on with the same settings, or choose another folder"
                )
        elif self._processes.is_main:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                _write_json(path, identity)
            except OSError as error:
                raise ConfigError(f"--out: {error}") from error
        self._processes.wait()

    def _generator(self, target: Any) -> OwnTarget | RunningService:
        settings = self._settings
        if settings.endpoint is None:
            return OwnTarget(target, max_tokens=settings.max_tokens)
        return RunningService(settings.endpoint, settings.access, max_tokens=settings.max_tokens)

    def _budget_s(self, generation: bool) -> float:
        total_s = self._settings.minutes * _MINUTE_S
        if self._settings.traffic is not None:
            return total_s
        return total_s * (_GENERATION_SHARE if generation else 1.0 - _GENERATION_SHARE)

    def _before(self, target: Any, draft: Any, data: Data) -> Acceptance:
        """Acceptance of the draft as it was given. Measured once, before the first step."""
        path = self._folder / "before.json"
        if path.exists():
            before = Acceptance.from_dict(json.loads(path.read_text("utf-8")))
        else:
            before = measure_acceptance(target, draft, data.held_out)
            if self._processes.is_main:
                _write_json(path, before.to_dict())
        self._processes.wait()
        self._show(
            f"before: {_rates(before)}, on {len(data.held_out)} held-out rows "
            f"({before.num_positions:,} positions)"
        )
        return before

    def _train(self, target: Any, draft: Any, data: Data) -> Position:
        settings, processes = self._settings, self._processes
        draft.requires_grad_(True)
        rows = processes.share(data.train) or data.train[:1]
        num_steps = settings.max_steps(len(rows), rows_per_step=settings.batch)
        limits = Limits(num_steps, self._budget_s(False))
        cache = TargetCache(
            target,
            rows,
            vocab_size=common_vocab_size(target, draft),
            max_bytes=settings.cache_mb << 20,
            seed=settings.seed,
        )
        lengths = [len(row.token_ids) for row in rows]

        def batch_of_step(step: int) -> Batch:
            return cache.batch(shuffled_batch(lengths, settings.batch, step, settings.seed))

        def show(event: TrainingEvent) -> None:
            done = Position(event.step, event.elapsed_s).done(limits)
            left_s = event.elapsed_s * (1 - done) / done if event.step else limits.time_budget_s
            self._show(f"step {event.step}, loss {event.loss:.4f}, {duration(left_s)} left")

        rate = settings.learning_rate
        if self._checkpoint.exists:
            self._show("going on from the checkpoint of an earlier run")
        self._show(
            f"training on {len(data.train)} rows, at most {num_steps} steps or "
            f"{duration(limits.time_budget_s)}; Ctrl-C measures the draft as it is then, and the "
            "same command goes on"
        )
        return train_draft(
            target,
            draft,
            batch_of_step,
            loss=LOSSES[settings.loss],
            optimiser=Optimiser(
                draft,
                matrix_rate=_MATRIX_RATE * rate,
                other_rate=rate,
                backward=processes.backward,
            ),
            limits=limits,
            checkpoint=self._checkpoint,
            checkpoint_s=settings.checkpoint_s,
            progress=show,
            processes=processes,
        )

    def _write(self, draft: Any, dtype: torch.dtype, report: DistillReport) -> None:
        """Writes to a folder of its own first: `out` has all files or none, config.json last."""
        settings, made = self._settings, self._folder / "draft"
        write_draft(draft, made, target=settings.target, dtype=dtype)
        described = {"settings": settings.identity(), **report.to_dict()}
        _write_json(made / REPORT, described)
        for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, settings.out / path.name)
        shutil.rmtree(self._folder)


def _write_json(path: Path, value: Any) -> None:
    """Replaces the file: a killed process leaves all of it or none."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _described(target: Any, draft: Any) -> str:
    large, small = target.num_parameters(), draft.num_parameters()
    return f"target: {large:,} parameters; draft: {small:,}, {large / small:.1f} times fewer"


def _rates(acceptance: Acceptance) -> str:
    return f"α {acceptance.sampled:.3f} at T = 1, {acceptance.greedy:.3f} greedy"
