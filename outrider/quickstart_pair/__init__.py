"""Quickstart pair: a small target and its distilled draft, as Hugging Face directories.

CARD.md describes the training, which is in `outrider_bench.quickstart`.
"""

from __future__ import annotations

from pathlib import Path

PAIR_PATH = Path(__file__).resolve().parent
TARGET_PATH = PAIR_PATH / "target"
DRAFT_PATH = PAIR_PATH / "draft"
