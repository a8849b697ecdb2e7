"""What is asked for: prompts that are the same in every run, and the ways to run them.

Sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outrider.cli.request import Method
from outrider.runtime.protobuf import verification_to_proto
from outrider.sampling.params import Verification
from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2

# For models that read text: Python source, which the quickstart pair was trained on.
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
    """As many as are asked for, each a function of the seed and its index alone."""

    def __init__(self, vocab_size: int, *, tokenizer: str | None, seed: int, length: int) -> None:
        """`tokenizer`: the model whose text prompts to use first; without one ids are random."""
        self._vocab_size = vocab_size
        self._seed = seed
        self._length = length
        loaded = Tokenizer.load(tokenizer) if tokenizer else None
        self._texts = [loaded.encode(text) for text in _TEXTS] if loaded else []

    def ids(self, index: int) -> list[int]:
        """Of the prompt's tokens, never empty."""
        if not self._texts:
            return self.random_ids(index, self._length)
        text = self._texts[index % len(self._texts)]
        # Beyond the texts, a few words more tell prompts apart.
        return [*self._texts[index // len(self._texts) % len(self._texts)], *text][-64:]

    def random_ids(self, index: int, length: int) -> list[int]:
        """[length], from all of the vocabulary but its last entry (a synthetic pair's EOS)."""
        generator = np.random.default_rng((self._seed, index))
        return [int(i) for i in generator.integers(0, self._vocab_size - 1, length)]


@dataclass(frozen=True)
class Variant:
    """One way to run a prompt. None: the server's default.

    `waits`: each round has all of `gamma`, whatever the draft's timing.
    """

    name: str
    gamma: int | None = None
    lookahead: int | None = None
    fan_out: int | None = None
    temperature: float = 0.0
    verification: Method = Method.rejection
    is_fast: bool = False
    waits: bool = False

    def request(
        self, prompt_ids: list[int], max_tokens: int, seed: int
    ) -> orchestrator_pb2.GenerateRequest:
        """Outputs are all of one length: EOS does not end them."""
        request = orchestrator_pb2.GenerateRequest(
            gamma=self.gamma, lookahead=self.lookahead, fan_out=self.fan_out
        )
        request.token_ids.ids.extend(prompt_ids)
        if self.is_fast:
            request.durability = orchestrator_pb2.DURABILITY_FAST
        if self.waits:
            request.draft_wait = orchestrator_pb2.DRAFT_WAIT_ALWAYS
        request.verification = verification_to_proto(Verification(self.verification.value))
        request.sampling.temperature = self.temperature
        request.sampling.seed = seed
        request.sampling.max_tokens = max_tokens
        request.sampling.ignore_eos = True
        return request


def plain(temperature: float = 0.0) -> Variant:
    """Without drafts: what all others are compared with."""
    return Variant("plain", gamma=0, temperature=temperature)


def adaptive(temperature: float = 0.0, verification: Method = Method.rejection) -> Variant:
    """What a caller gets who asks for nothing."""
    return Variant("full", temperature=temperature, verification=verification)


def fixed(gamma: int, temperature: float = 0.0) -> Variant:
    return Variant(f"γ {gamma}", gamma=gamma, temperature=temperature, waits=True)
