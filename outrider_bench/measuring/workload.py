"""Workload: reproducible prompts, and variants (request settings to compare)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outrider.cli.request import DraftSource, Method
from outrider.runtime.protobuf import verification_to_proto
from outrider.sampling.params import Verification
from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2
from outrider_bench.distill.prompts import read_prompts

_MAX_TOKENS = 64
# For models with a tokenizer: Python source, which the quickstart pair was trained on.
_TEXTS = (
    'def fibonacci(n):\n    """Return',
    "import os\n\nclass Cache:\n    def __init__(self, size):\n",
    "def read_lines(path):\n    with open(path) as file:\n",
    "class Stack:\n    def push(self, item):\n",
    "def test_parse_date():\n    assert",
    "import argparse\n\ndef main():\n    parser = argparse.",
    "    def __repr__(self):\n        return",
    "for name, value in sorted(",
)


class Prompts:
    """Unlimited prompts; each depends only on the seed and its index."""

    def __init__(
        self,
        vocab_size: int,
        *,
        tokenizer: str | None,
        seed: int,
        length: int,
        file: Path | None = None,
    ) -> None:
        """`tokenizer`: model whose tokenizer encodes the text prompts; None: random token ids.

        `vocab_size` and `length` are for random ids. `file`: prompts to use instead, as those of a
        distillation. Raises ConfigError for that file.
        """
        self._vocab_size = vocab_size
        self._seed = seed
        self._length = length
        loaded = Tokenizer.load(tokenizer) if tokenizer else None
        self._texts = [loaded.encode(text) for text in _TEXTS] if loaded else []
        if file is not None:
            self._texts = read_prompts(file, loaded, max_tokens=_MAX_TOKENS, flag="--texts")

    def ids(self, index: int) -> list[int]:
        """Token ids of a prompt; never empty."""
        if not self._texts:
            return self.random_ids(index, self._length)
        text = self._texts[index % len(self._texts)]
        # Indices beyond the texts prepend another text, so that prompts differ.
        others = self._texts[index // len(self._texts) % len(self._texts)]
        return [*others, *text][-_MAX_TOKENS:]

    def random_ids(self, index: int, length: int) -> list[int]:
        """[length] random ids, without the last of the vocabulary (EOS of a synthetic pair)."""
        generator = np.random.default_rng((self._seed, index))
        return [int(i) for i in generator.integers(0, self._vocab_size - 1, length)]


@dataclass(frozen=True)
class Variant:
    """Request settings to compare. None: the server's default.

    `waits`: every round waits for all `gamma` draft tokens, however late the draft is.
    `is_plain_sampling`: nothing but the temperature changes the distribution, whatever the model's
    own defaults are.
    `is_seeded` False: each output has a random seed.
    """

    name: str
    gamma: int | None = None
    lookahead: int | None = None
    fan_out: int | None = None
    temperature: float = 0.0
    verification: Method = Method.rejection
    is_fast: bool = False
    waits: bool = False
    draft_source: DraftSource | None = None
    ignores_eos: bool = True
    is_plain_sampling: bool = False
    is_seeded: bool = True

    def request(
        self, prompt_ids: list[int], max_tokens: int, seed: int
    ) -> orchestrator_pb2.GenerateRequest:
        """GenerateRequest. If it ignores EOS, all outputs have `max_tokens` tokens."""
        source = "UNSPECIFIED" if self.draft_source is None else self.draft_source.name.upper()
        request = orchestrator_pb2.GenerateRequest(
            gamma=self.gamma,
            lookahead=self.lookahead,
            fan_out=self.fan_out,
            draft_source=f"DRAFT_SOURCE_{source}",
        )
        request.token_ids.ids.extend(prompt_ids)
        if self.is_fast:
            request.durability = orchestrator_pb2.DURABILITY_FAST
        if self.waits:
            request.draft_wait = orchestrator_pb2.DRAFT_WAIT_ALWAYS
        request.verification = verification_to_proto(Verification(self.verification.value))
        request.sampling.temperature = self.temperature
        if self.is_seeded:
            request.sampling.seed = seed
        request.sampling.max_tokens = max_tokens
        request.sampling.ignore_eos = self.ignores_eos
        if self.is_plain_sampling:
            request.sampling.top_p, request.sampling.repetition_penalty = 1.0, 1.0
            request.sampling.top_k, request.sampling.min_p = 0, 0.0
        return request


def plain(temperature: float = 0.0) -> Variant:
    """Variant without drafts: the baseline."""
    return Variant("plain", gamma=0, temperature=temperature)


def adaptive(temperature: float = 0.0, verification: Method = Method.rejection) -> Variant:
    """Variant with the server's defaults: adaptive γ."""
    return Variant("full", temperature=temperature, verification=verification)


def fixed(gamma: int, temperature: float = 0.0) -> Variant:
    """Variant that waits for `gamma` draft tokens in every round."""
    return Variant(f"γ {gamma}", gamma=gamma, temperature=temperature, waits=True)
