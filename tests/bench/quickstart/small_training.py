"""Trains a pair of tiny models, one of them endlessly: `python -m … OUT target|draft`."""

from __future__ import annotations

import sys
from pathlib import Path

from outrider.cli.failures import Signalled
from outrider_bench.commands.quickstart import made
from outrider_bench.distill.optimise import Limits
from outrider_bench.quickstart.architecture import ModelShape
from outrider_bench.quickstart.corpus import Corpus
from outrider_bench.quickstart.distill import DistillConfig
from outrider_bench.quickstart.evaluate import EvaluationConfig
from outrider_bench.quickstart.train import TrainingConfig

PROMPTS = (
    '"""Keeps a bounded history of measurements."""\n\nimport collections\nimport time\n\n\n'
    "class History:\n    def __init__(self, size):\n        self._size = size\n",
    'def read_records(path, encoding=\'utf-8\'):\n    """Yield one dictionary per line."""\n'
    "    with open(path, encoding=encoding) as file:\n        for line in file:\n",
    'class ServerError(Exception):\n    """Raised when the server refuses a request."""\n\n'
    "    def __init__(self, status, message):\n        super().__init__(message)\n",
    "def main():\n    import argparse\n    parser = argparse.ArgumentParser(description=__doc__)\n"
    "    parser.add_argument('-v', '--verbose', action='store_true',\n",
)
CORPUS = Corpus(train=PROMPTS * 4, held_out=PROMPTS * 4)
SHORT = EvaluationConfig(num_prompts=4, num_prompt_tokens=8, num_new_tokens=8)
ENDLESS = 10_000_000
# The learning rate depends on the elapsed share of the time limit: only without one is it
# reproducible.
NO_LIMIT_S = 1e9


def small(*, num_target_steps: int, num_draft_steps: int) -> TrainingConfig:
    return TrainingConfig(
        vocab_size=300,
        target_shape=ModelShape(32, 2, 2, 1, 64, head_dim=16),
        draft_shape=ModelShape(16, 1, 1, 1, 32, head_dim=16),
        target_limits=Limits(num_steps=num_target_steps, time_budget_s=NO_LIMIT_S),
        windows=((2, 32), (1, 64)),
        distill=DistillConfig(
            num_rollouts=4,
            rollout_batch=4,
            num_prompt_tokens=8,
            num_new_tokens=8,
            rows=2,
            num_window_tokens=16,
            limits=Limits(num_steps=num_draft_steps, time_budget_s=NO_LIMIT_S),
        ),
    )


if __name__ == "__main__":
    steps = (ENDLESS, 4) if sys.argv[2] == "target" else (6, ENDLESS)
    config = small(num_target_steps=steps[0], num_draft_steps=steps[1])
    try:
        made(Path(sys.argv[1]), config, corpus=CORPUS, evaluation=SHORT)
    except Signalled as error:
        sys.exit(error.exit_code)
