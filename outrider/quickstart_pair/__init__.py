"""The quickstart pair: a small target and its distilled draft, two Hugging Face directories.

CARD.md says how they were trained. Training is in `outrider_bench.quickstart`; no service needs it.
"""

from __future__ import annotations

from pathlib import Path

PAIR_PATH = Path(__file__).resolve().parent
TARGET_PATH = PAIR_PATH / "target"
DRAFT_PATH = PAIR_PATH / "draft"
