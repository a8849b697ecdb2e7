"""Settings of a distillation: validated together, compared with those of an unfinished run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.errors import ConfigError
from outrider_bench.distill.losses import LOSSES

if TYPE_CHECKING:
    from outrider.client.channel import Access


# More repetitions of the same rows fit those rows, and lower α on others (measured: results.md).
_MAX_EPOCHS = 16


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """One distillation. Names are those of the command's flags."""

    target: str
    out: Path
    draft: str | None = None
    from_layers: int | None = None
    prompts: Path | None = None
    traffic: Path | None = None
    endpoint: str | None = None
    access: Access | None = None
    loss: str = "kl"
    minutes: float = 20.0
    steps: int | None = None
    samples: int = 2048
    max_tokens: int = 128
    max_prompt_tokens: int = 384
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    batch: int = 16
    learning_rate: float = 5e-4
    cache_mb: int = 2048
    checkpoint_s: float = 60.0
    device: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError, naming the flag."""
        _exactly_one("--draft", self.draft, "--from-layers", self.from_layers)
        _exactly_one("--prompts", self.prompts, "--traffic", self.traffic)
        if self.traffic is not None and self.endpoint is not None:
            raise ConfigError("--endpoint: not used with --traffic, which has outputs already")
        if self.loss not in LOSSES:
            raise ConfigError(f"--loss: {self.loss!r} is unknown; allowed: {', '.join(LOSSES)}")
        for path, flag in ((self.prompts, "--prompts"), (self.traffic, "--traffic")):
            if path is not None and not path.exists():
                raise ConfigError(f"{flag}: {path} does not exist")
        if (self.out / "config.json").exists():
            raise ConfigError(f"--out: {self.out} already has a model; choose another folder")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError("--temperatures: at least one number, none below 0")
        # Before the first row, not after an hour of them.
        if self.minutes <= 0:
            raise ConfigError(f"--minutes: {self.minutes:g} is too small; above 0")
        if self.learning_rate <= 0:
            raise ConfigError(f"--learning-rate: {self.learning_rate:g} is too small; above 0")

    def max_steps(self, num_rows: int, *, rows_per_step: int) -> int:
        """`steps`; without it, as many as use each row sixteen times."""
        return self.steps or max(1, _MAX_EPOCHS * num_rows // rows_per_step)

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the first. Its limits may differ."""
        return {
            "target": self.target,
            "draft": self.draft,
            "from_layers": self.from_layers,
            "prompts": _digest(self.prompts),
            "traffic": None if self.traffic is None else str(self.traffic),
            "loss": self.loss,
            "samples": self.samples,
            "max_tokens": self.max_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "temperatures": list(self.temperatures),
            "batch": self.batch,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


def _exactly_one(name: str, value: object, other_name: str, other: object) -> None:
    if (value is None) == (other is None):
        given = "both are" if value is not None else "neither is"
        raise ConfigError(f"{name}, {other_name}: {given} given; give one")


def _digest(path: Path | None) -> str | None:
    """SHA-256 of the file: other prompts would hold out others."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
