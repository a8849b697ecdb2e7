"""Hugging Face baseline: transformers' own `generate`, plain and assisted, as a measuring server.

A benchmark can interleave it with Outrider in one run. Uses transformers' own layers, sampler and
cache, and no code of ours. Warm-up, repetitions and CPU pinning belong to the caller.

`python -m outrider_bench.peers.huggingface_baseline --target DIR --draft DIR` prints one JSON line
when ready. It then answers each line on stdin with one on stdout: `BaselineRequest` with
`Measurement` or {"error": …}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from outrider.errors import ConfigError, InternalError, ModelError, OutriderError
from outrider_bench.peers.baseline_request import BaselineRequest, are_ids, check

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NUM_RANDOM_PROMPTS, _RANDOM_PROMPT_LEN = 64, 16


@dataclass(frozen=True)
class Measurement:
    """Times of one generation, from before the call of `generate` (perf_counter).

    `tokens_per_s`: tokens after the first ones shown, over the time since; None if none followed.
    Plain decoding shows one token at a time, assisted generation those of a round.
    """

    token_ids: list[int]
    seconds_to_first: float
    seconds: float
    tokens_per_s: float | None
    num_target_forwards: int
    num_draft_forwards: int


class HuggingFaceBaseline:
    """Target and draft as transformers loads them. Not thread-safe."""

    def __init__(self, target: str | Path, draft: str | Path, dtype: str = "float32") -> None:
        self._target = _loaded(target, dtype)
        self._draft = _loaded(draft, dtype)
        self._num_target, self._num_draft = (
            _ForwardCounter(self._target),
            _ForwardCounter(self._draft),
        )

    @property
    def vocab_size(self) -> int:
        return int(self._target.config.vocab_size)

    @property
    def max_len(self) -> int:
        """Maximum length of prompt and output together."""
        return int(self._target.config.max_position_embeddings)

    def measure(self, request: BaselineRequest) -> Measurement:
        """Generates exactly `max_new_tokens`: no end of sequence. Raises InvalidRequest,
        InternalError.
        """
        check(max(request.prompt) < self.vocab_size, "prompt", "has ids outside the vocabulary")
        needed, max_len = len(request.prompt) + request.max_new_tokens, self.max_len
        check(
            needed <= max_len,
            "max_new_tokens",
            f"{needed} tokens with the prompt; at most {max_len}",
        )
        self._draft.generation_config = _assistant_config(request)
        assisted = {"assistant_model": self._draft} if request.variant == "assisted" else {}
        prompt = torch.tensor([request.prompt])
        self._num_target.count = self._num_draft.count = 0
        # generate() samples from torch's global generator only.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            times = _ShownTimes()
            try:
                ids = self._target.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=_config(request),
                    streamer=times,
                    **assisted,
                )
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise InternalError(f"transformers' generate failed: {error}") from error
        return self._measurement(ids[0, prompt.shape[1] :].tolist(), times)

    def _measurement(self, token_ids: list[int], times: _ShownTimes) -> Measurement:
        (first_s, num_first), (last_s, _) = times.shown[0], times.shown[-1]
        num_later = len(token_ids) - num_first
        return Measurement(
            token_ids=token_ids,
            seconds_to_first=first_s,
            seconds=last_s,
            tokens_per_s=num_later / (last_s - first_s) if num_later else None,
            num_target_forwards=self._num_target.count,
            num_draft_forwards=self._num_draft.count,
        )


class _ShownTimes(BaseStreamer):
    """Streamer that records (seconds since its creation, number of tokens) of each piece shown."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._is_prompt = True
        self.shown: list[tuple[float, int]] = []

    def put(self, value: Tensor) -> None:
        if not self._is_prompt:
            self.shown.append((time.perf_counter() - self._began, value.numel()))
        self._is_prompt = False

    def end(self) -> None:
        pass


class _ForwardCounter:
    """Counts a model's forward passes."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def serve(
    baseline: HuggingFaceBaseline, lines: Iterable[str], prompts: Sequence[list[int]] = ()
) -> Iterator[dict[str, Any]]:
    """Yields one answer per line, in order: a Measurement's fields, or `error`."""
    for line in lines:
        try:
            request = BaselineRequest.from_json(line, prompts)
            yield dataclasses.asdict(baseline.measure(request))
        except OutriderError as error:
            yield {"error": str(error)}


def _loaded(directory: str | Path, dtype: str) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=_DTYPES[dtype]).train(False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: {error}") from error
    # No end of sequence: outputs have the requested length. An explicit padding id avoids a
    # warning.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=None, pad_token_id=0
    )
    return model


def _config(request: BaselineRequest) -> Any:
    sampling = {"temperature": request.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=request.max_new_tokens,
        do_sample=request.temperature > 0,
        pad_token_id=0,
        **(sampling if request.temperature > 0 else {}),
    )


def _assistant_config(request: BaselineRequest) -> Any:
    """New generation config per request: transformers stores what its heuristics learn in it."""
    config: Any = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    if request.is_tuned:
        config.num_assistant_tokens = request.num_assistant_tokens
        config.num_assistant_tokens_schedule = request.schedule
        config.assistant_confidence_threshold = request.confidence_threshold or 0.0
    return config


def _prompts(path: Path | None, vocab_size: int) -> list[list[int]]:
    """Prompts of a file (JSON list of lists of ids), or random ones with a fixed seed."""
    if path is None:
        shape = (_NUM_RANDOM_PROMPTS, _RANDOM_PROMPT_LEN)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab_size, shape, generator=generator).tolist()
    try:
        prompts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts: {error}") from None
    if not isinstance(prompts, list) or not all(are_ids(prompt) for prompt in prompts):
        raise ConfigError(f"--prompts: {path} must be a JSON list of non-empty lists of token ids")
    return prompts


def main() -> int:
    """Serves until stdin ends. Exit status 2 for an invalid flag."""
    parser = argparse.ArgumentParser(
        description="Measure transformers' generate on a pair of models."
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--prompts", type=Path, help="JSON list of prompts. Default: random ones.")
    arguments = parser.parse_args()
    if arguments.num_threads < 1:
        parser.error(f"--num-threads: {arguments.num_threads} is too small; at least 1")
    torch.set_num_threads(arguments.num_threads)
    try:
        baseline = HuggingFaceBaseline(arguments.target, arguments.draft, arguments.dtype)
        prompts = _prompts(arguments.prompts, baseline.vocab_size)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    ready = {
        "ready": True,
        "transformers": transformers.__version__,
        "dtype": arguments.dtype,
        "num_threads": arguments.num_threads,
        "vocab_size": baseline.vocab_size,
        "num_prompts": len(prompts),
    }
    print(json.dumps(ready), flush=True)
    for answer in serve(baseline, sys.stdin, prompts):
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
