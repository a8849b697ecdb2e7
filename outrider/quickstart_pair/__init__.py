"""The quickstart pair: a small target and its distilled draft, shipped with Outrider.

Owns where the pair lies, how it was trained from nothing (`train`), how it is measured
(`evaluate`) and how the target is made to cost as much as a large model (`inflate`). Knows
nothing of services, speculation or the packed engine: the pair is two ordinary Hugging Face
directories. This module imports no torch of its own.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["draft_path", "pair_path", "target_path"]


def pair_path() -> Path:
    """The directory of the shipped pair, with `target/`, `draft/` and `CARD.md`."""
    return Path(__file__).resolve().parent / "pair"


def target_path() -> Path:
    """The shipped target: a directory for `AutoModelForCausalLM` and `AutoTokenizer`."""
    return pair_path() / "target"


def draft_path() -> Path:
    """The shipped draft: a directory like the target's, with the same tokenizer."""
    return pair_path() / "draft"
