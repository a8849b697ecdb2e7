"""Self-test before a model serves: logits of this engine against plain eager attention.

Runs the same weights twice: one sequence at a time with transformers' eager attention, and as
ragged steps with chunked prefill, verification and roll-back through `Engine.forward`. Long
sequences and sliding windows are tested in `long_self_test.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outrider.engine.attention.interface import ATTENTION_NAME
from outrider.engine.engine import Engine
from outrider.engine.interface import Append
from outrider.engine.parallel.group import whole
from outrider.errors import ModelError

_FIRST_LEN = 24
_SECOND_LEN = 17

# Largest difference allowed, in standard deviations of the logits. Low precision differs by a few
# hundredths; a wrong mask or position by about one.
_TOLERANCE = {torch.float32: 1e-2}
# Of 16-bit types, and of quantised models: quantised activations round to steps as coarse.
_LOW_TOLERANCE = 0.5

Tokens = npt.NDArray[np.int64]


def short_sequences(model: Any, max_context_len: int) -> tuple[Tokens, Tokens]:
    """Two short sequences of random tokens, cut to the context length."""
    first, second = (min(n, max_context_len) for n in (_FIRST_LEN, _SECOND_LEN))
    return random_tokens(model, first, seed=0), random_tokens(model, second, seed=2)


def random_tokens(model: Any, length: int, *, seed: int) -> Tokens:
    """Random tokens with finite embeddings: a NaN would hide every later error."""
    weight = model.get_input_embeddings().weight
    spread = whole(weight.amax(-1)) - whole(weight.amin(-1))
    finite = torch.isfinite(spread).nonzero()[:, 0].cpu().numpy()
    if not len(finite):
        finite = np.arange(len(weight))
    return finite[np.random.default_rng(seed).integers(len(finite), size=length)]


def eager_logits(model: Any, sequences: Seq[Tokens], *, num_rows: int = 0) -> list[torch.Tensor]:
    """Uncached eager logits of each sequence, float32 [tokens, vocab]; then restores our attention.

    `num_rows`: only of the last tokens; 0: of all.
    """
    device = model.get_input_embeddings().weight.device
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return [
                model(
                    torch.from_numpy(ids)[None].to(device),
                    use_cache=False,
                    logits_to_keep=num_rows,
                )
                .logits[0]
                .float()
                for ids in sequences
            ]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def compare(
    name: str, engine: Engine, sequences: tuple[Tokens, Tokens], expected: list[torch.Tensor]
) -> float:
    """Largest difference from `expected`. Raises ModelError if rounding cannot explain it."""
    largest = 0.0
    for ids, expected_rows, actual in _ragged_steps(engine, sequences, expected):
        if actual.shape != expected_rows.shape:
            raise ModelError(f"{name}: logits of shape {tuple(actual.shape)} for {ids} tokens")
        largest = max(largest, difference(expected_rows, actual))
    return check_difference(name, largest, torch.cat(expected), engine)


def difference(expected_rows: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference of a logit; infinity if one is NaN."""
    return float((actual - expected_rows).abs().nan_to_num(torch.inf).max())


def allowed_difference(expected: torch.Tensor, engine: Engine) -> float:
    """The largest difference of a logit that rounding explains."""
    tolerance = _TOLERANCE.get(engine.store.keys[0].dtype, _LOW_TOLERANCE)
    return (_LOW_TOLERANCE if engine.info.quantization else tolerance) * _scale(expected)


def _scale(expected: torch.Tensor) -> float:
    return max(float(expected.std()), 1e-6)


def check_difference(name: str, largest: float, expected: torch.Tensor, engine: Engine) -> float:
    """Return `largest`. Raises ModelError if it is more than rounding explains."""
    if not largest <= allowed_difference(expected, engine):
        raise ModelError(
            f"{name}: logits differ by {largest:.3g} from plain attention (their standard "
            f"deviation is {_scale(expected):.3g}): not served correctly"
        )
    return largest


def _ragged_steps(
    engine: Engine, sequences: tuple[Tokens, Tokens], expected: list[torch.Tensor]
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(tokens, expected, actual) for each part of three steps over both sequences."""
    handles = [engine.store.open(len(ids)) for ids in sequences]
    results = []
    one, two = len(sequences[0]) // 2, len(sequences[1]) // 3
    ends = tuple(len(ids) for ids in sequences)
    steps = [
        ((0, 0), (one, two)),
        ((one, two), (one + 4, two + 1)),
        # The first sequence is rolled back by three tokens; the prefill of the second continues.
        ((one + 1, two + 1), ends),
    ]
    for starts, stops in steps if min(ends) >= _SECOND_LEN else [((0, 0), ends)]:
        parts = []
        for handle, ids, start, stop in zip(handles, sequences, starts, stops, strict=True):
            engine.store.truncate(handle, start)
            parts.append(Append(handle, ids[start:stop], stop - start))
        logits = engine.forward(parts)
        row = 0
        for part, expected_rows, start, stop in zip(parts, expected, starts, stops, strict=True):
            results.append(
                (part.num_logits, expected_rows[start:stop], logits[row : row + stop - start])
            )
            row += stop - start
    for handle in handles:
        engine.store.free(handle)
    return results
