"""What the services must agree with: plain Hugging Face, and processors written here once more.

Nothing of `outrider` is imported but, for seeded sampling, the noise itself. One sequence at a
time, no KV cache, float64 after the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from outrider.sampling.random import Purpose, stream_key, token_gumbels

Floats = npt.NDArray[np.float64]
Sampling = dict[str, Any]

# Of two logits that are nearer, either may be called the larger one in float32.
TIE = 1e-4


class Reference:
    """The target as transformers runs it."""

    def __init__(self, directory: Path) -> None:
        auto: Any = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.eos_token_id: int = self.model.config.eos_token_id
        self._greedy: dict[tuple[int, ...], list[int]] = {}

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Floats:
        """[len(token_ids), vocab]: row i is what follows token i."""
        rows = self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return np.asarray(rows.double().numpy())

    def output_logits(self, prompt: Sequence[int], output: Sequence[int]) -> Floats:
        """[len(output), vocab]: row i is what output token i was chosen from."""
        return self.logits([*prompt, *output])[len(prompt) - 1 : -1]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """By `generate(do_sample=False)`; ends with EOS if it comes."""
        key = (num_tokens, *prompt)
        if key in self._greedy:
            return self._greedy[key]
        with torch.inference_mode():
            ids = self.model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=num_tokens,
                pad_token_id=0,  # never reached: one sequence
            )
        output: list[int] = ids[0, len(prompt) :].tolist()
        self._greedy[key] = output
        return output

    @torch.inference_mode()
    def laws_of(
        self, prompt: Sequence[int], outputs: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Floats]:
        """`laws` of each output; those of one length in one pass, whose rows know nothing of each
        other."""
        together: dict[int, list[int]] = {}
        for i, output in enumerate(outputs):
            together.setdefault(len(output), []).append(i)
        rows: dict[int, Floats] = {}
        for number in together.values():
            ids = torch.tensor([[*prompt, *outputs[i]] for i in number])
            logits = self.model(ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
            rows |= zip(number, logits.double().numpy(), strict=True)
        return [self._laws(rows[i], prompt, output, sampling) for i, output in enumerate(outputs)]

    def laws(self, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> Floats:
        """[len(output), vocab]: the law of each output token given those before it."""
        return self._laws(self.output_logits(prompt, output), prompt, output, sampling)

    def _laws(
        self, rows: Floats, prompt: Sequence[int], output: Sequence[int], sampling: Sampling
    ) -> Floats:
        return np.stack(
            [
                law(row, prompt, output[:i], sampling, self.eos_token_id)
                for i, row in enumerate(rows)
            ]
        )


def assert_greedy(
    reference: Reference, prompt: Sequence[int], expected: Sequence[int], emitted: Sequence[int]
) -> None:
    """Equal token for token, for the two likeliest tokens may come out equal: machines then differ.

    Where they do, either is right, and what follows is compared with what follows that one.
    """
    emitted, expected = list(emitted), list(expected)
    while emitted != expected:
        pairs = zip(emitted, expected, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(emitted), len(expected)))
        row = reference.logits([*prompt, *expected[:at]])[-1]
        second, first = np.sort(row)[-2:]
        is_tied = at < min(len(emitted), len(expected)) and row[emitted[at]] > first - TIE
        assert is_tied, (
            f"differs at {at} of {len(expected)}: {emitted} is not {expected}; "
            f"the two likeliest are {first - second:.3g} apart"
        )
        taken = [*prompt, *emitted[: at + 1]]
        num_left = 0 if taken[-1] == reference.eos_token_id else len(expected) - at - 1
        rest = reference.greedy(taken, num_left) if num_left else []
        expected = [*emitted[: at + 1], *rest]


def law(
    logits: Floats, prompt: Sequence[int], output: Sequence[int], sampling: Sampling, eos: int
) -> Floats:
    """The distribution [vocab] of the token after prompt + output, written out step by step."""
    vocab_size = len(logits)
    scores = [float(x) for x in logits]
    if allowed := sampling.get("allowed_token_ids"):
        scores = [x if i in allowed else -np.inf for i, x in enumerate(scores)]
    for sequence in sampling.get("bad_words_token_ids", ()):
        *before, last = sequence["ids"]
        if not before or list(output[-len(before) :]) == before:
            scores[last] = -np.inf
    for token_id, bias in sampling.get("logit_bias", {}).items():
        scores[token_id] += bias
    if len(output) < sampling.get("min_tokens", 0):
        stops = set(sampling.get("stop_token_ids", ()))
        if not sampling.get("ignore_eos"):
            stops.add(eos)
        for token_id in stops:
            scores[token_id] = -np.inf
    factor = sampling.get("repetition_penalty", 1.0)
    for i in {*prompt, *output}:
        scores[i] = scores[i] / factor if scores[i] > 0 else scores[i] * factor
    for i, count in Counter(output).items():
        scores[i] -= sampling.get("frequency_penalty", 0.0) * count
        scores[i] -= sampling.get("presence_penalty", 0.0)
    temperature = sampling.get("temperature", 1.0)
    if temperature == 0:
        return np.eye(vocab_size)[int(np.argmax(scores))]
    weights = np.exp((np.array(scores) - max(scores)) / temperature)
    weights[weights < sampling.get("min_p", 0.0)] = 0.0
    order = np.argsort(-weights, kind="stable")
    top_k = sampling.get("top_k", 0)
    if top_k > 0:
        weights[order[top_k:]] = 0.0
    weights /= weights.sum()
    covered = 0.0
    for token_id in order:
        if covered >= sampling.get("top_p", 1.0):
            weights[token_id] = 0.0
        covered += weights[token_id]
    return np.asarray(weights / weights.sum())


def seeded_scores(probs: Floats, seed: int, position: int) -> Floats:
    """The token of the highest is the one that `coupled` owes to this seed."""
    key = np.array([stream_key(seed, Purpose.TARGET, position)])
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(probs) + token_gumbels(key, np.arange(len(probs)))[0])


def assert_seeded(
    reference: Reference,
    prompt: Sequence[int],
    emitted: Sequence[int],
    sampling: Sampling,
) -> None:
    """Every token is the Gumbel-max choice from Hugging Face's law given the tokens before it.

    Of two that float32 hardly tells apart, either: which one is chosen may depend on who else is in
    the pass.
    """
    for i, probs in enumerate(reference.laws(prompt, emitted, sampling)):
        scores = seeded_scores(probs, sampling["seed"], len(prompt) + i)
        behind = scores.max() - scores[emitted[i]]
        assert behind < TIE, (
            f"token {i} is {emitted[i]}, not {scores.argmax()}; it is {behind:.3g} behind"
        )
