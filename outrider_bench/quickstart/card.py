"""Model card of a trained pair. Every number comes from a `PairReport`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import metadata, version
from pathlib import Path

from outrider_bench.quickstart.evaluate import PairReport
from outrider_bench.quickstart.train import TrainingConfig

_TEXT = """\
# Outrider's quickstart pair

A small target model and a draft distilled from it, so that Outrider can be tried, tested and
demonstrated without a download. Both are Llama models with one byte-level BPE tokenizer of
{vocab_size} tokens. They complete Python code, badly: they exist to exercise speculative
decoding, not to be useful.

| | target | draft |
|---|---|---|
| parameters | {num_target_parameters:,} | {num_draft_parameters:,} |
| held-out loss (nats a token) | {held_out_loss:.3f} | {draft_held_out_loss:.3f} |

| acceptance on held-out files | |
|---|---|
| greedy: the draft's argmax is the target's, along the target's greedy text | {greedy_alpha:.3f} |
| the same over the first 32 new tokens only | {early_greedy_alpha:.3f} |
| temperature 1: mean 1 - TV(target, draft), along the target's sampled text | {sampled_alpha:.3f} |

Measured in float32 on the files in this directory, on {num_prompts} prompts of 64 tokens from
held-out files of the standard library, 128 new tokens each. Greedy text of so small a model soon
repeats itself, and repetition is easy to draft: hence the second line. Short or varied outputs are
accepted at the lower rates.

## Training

- Text: {text}, without tests and encodings; about 3% of the files, chosen by a hash of their path,
  held out. Short documented functions appear a second time as an exchange (docstring, then source)
  in the chat template's format.
- Target: next-token loss on windows of 512 to 2048 tokens. Draft: KL divergence from the target,
  half on that text, half on the target's own greedy and sampled continuations.
- Trained on a CPU in bfloat16 autocast; stored as bfloat16.
- {steps}
- Repeat with `outrider quickstart train --out DIR{packages}`. A run that reaches its
  step limits repeats up to floating-point order; one that wall-clock limits end does not.

## Licence

Trained from nothing on CPython's standard library, (c) Python Software Foundation and
contributors, distributed under the PSF License Agreement (https://docs.python.org/3/license.html){others}.
The models can reproduce short passages of it; such passages remain under their licence.
"""


def write_card(pair_dir: Path, report: PairReport, config: TrainingConfig, *, steps: str) -> None:
    """Writes `pair_dir/CARD.md` for a pair trained on the running Python's sources.

    `steps`: one sentence on how long it was trained.
    """
    text = _TEXT.format(
        vocab_size=config.vocab_size,
        text=" and ".join(
            [
                f"the standard library of CPython {platform.python_version()}",
                *(f"{name} {version(name)}" for name in config.packages),
            ]
        ),
        packages=f" --packages {','.join(config.packages)}" if config.packages else "",
        others="".join(
            f"; on {name}, under its licence ({_licence(name)})" for name in config.packages
        ),
        num_prompts=report.num_prompts,
        num_target_parameters=report.num_target_parameters,
        num_draft_parameters=report.num_draft_parameters,
        held_out_loss=report.held_out_loss,
        draft_held_out_loss=report.draft_held_out_loss,
        early_greedy_alpha=report.early_greedy_alpha,
        greedy_alpha=report.greedy_alpha,
        sampled_alpha=report.sampled_alpha,
        steps=steps,
    )
    (pair_dir / "CARD.md").write_text(text, encoding="utf-8")


def _licence(package: str) -> str:
    """What the package's metadata says of its licence."""
    about = metadata(package)
    stated = [about[field] for field in ("License-Expression", "License") if field in about]
    return stated[0].splitlines()[0] if stated else "see the package"


def write_cut_card(pair_dir: Path, steps: str, losses: Mapping[str, float]) -> None:
    """Writes `pair_dir/CARD.md` for an interrupted training. `losses`: the last one per model."""
    pair_dir.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Outrider's quickstart pair, interrupted",
        "",
        f"{steps} Acceptance was not measured.",
    ]
    if losses:
        lines += ["", "| model | last training loss (nats a token) |", "|---|---|"]
        lines += [f"| {name} | {loss:.3f} |" for name, loss in losses.items()]
    (pair_dir / "CARD.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
