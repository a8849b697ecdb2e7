"""Makes synthetic model pairs: the cost of a real pair, a chosen acceptance rate, no download.

Searches the ε of `SyntheticPair` that gives the requested α, and writes the files. The models have
no tokenizer: prompts are token ids. Command: `python -m outrider_bench.models.synthetic DIRECTORY
--size p1 --alpha 0.8`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.errors import ConfigError, InternalError, OutriderError
from outrider_bench.models.synthetic_pair import (
    NUM_DRAFT_LAYERS,
    SIZES,
    Agreement,
    PairSize,
    Sample,
    SyntheticPair,
)

# Many prompts, because a random model's continuation of one may repeat itself. Standard deviation
# of α over prompts: about 0.005 for `_MANY`, 0.010 for `_FEW`.
_FEW, _MANY = Sample(64, 24), Sample(128, 48)

_REPORT = "pair.json"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class PairReport:
    """Content of `pair.json`. See `Agreement` for the two acceptance rates.

    `alpha`: the requested α at `temperature`; None if ε was given instead.
    """

    size: str
    dtype: str
    vocab_size: int
    seed: int
    alpha: float | None
    temperature: float
    epsilon: float
    greedy_acceptance: float
    sampled_acceptance: float
    entropy_nats: float | None
    num_positions: int
    target_parameters: int
    draft_parameters: int


def make_pair(
    directory: Path,
    size: str = "p1",
    *,
    alpha: float = 0.8,
    temperature: float = 0.0,
    epsilon: float | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress = lambda measured: None,
) -> PairReport:
    """Writes a pair whose measured α at this temperature (0 or 1) is within 0.01 of `alpha`.

    With `epsilon` there is no search and `alpha` is ignored. `dtype`: of the checkpoints. Writes
    `directory/target` and `directory/draft`, then `directory/pair.json`, which marks the pair as
    complete. `progress` is called after each measurement. Raises ConfigError for invalid arguments.
    """
    shape = _checked_shape(size, alpha, temperature, epsilon, vocab_size)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is unknown; allowed: {', '.join(_DTYPES)}")
    _clear(directory)
    pair = SyntheticPair(shape, seed=seed, dtype=_DTYPES[dtype])

    def measured(epsilon: float, sample: Sample) -> Agreement:
        pair.scale(epsilon)
        agreement = pair.measure(temperature, sample)
        progress({"epsilon": epsilon, "alpha": agreement.alpha})
        return agreement

    sample = _MANY if epsilon is None else _FEW
    if epsilon is None:
        # The noise of the layers adds up as the square root of their number; the factor was
        # measured.
        guess = 0.4 * (1 - alpha) / alpha / math.sqrt(shape.num_layers - NUM_DRAFT_LAYERS)
        guess, _ = _search(lambda e: measured(e, _FEW), alpha, guess, tolerance=0.02)
        found, agreement = _search(lambda e: measured(e, _MANY), alpha, guess, tolerance=0.008)
    else:
        found, agreement = epsilon, measured(epsilon, _FEW)
    other = pair.measure(1.0 - temperature, sample)
    greedy, sampled = (agreement, other) if temperature == 0 else (other, agreement)
    target_parameters, draft_parameters = pair.save(directory)
    report = PairReport(
        size=size,
        dtype=dtype,
        vocab_size=shape.vocab_size,
        seed=seed,
        alpha=alpha if epsilon is None else None,
        temperature=temperature,
        epsilon=found,
        greedy_acceptance=greedy.alpha,
        sampled_acceptance=sampled.alpha,
        entropy_nats=sampled.entropy_nats,
        num_positions=sample.num_prompts * sample.num_tokens,
        target_parameters=target_parameters,
        draft_parameters=draft_parameters,
    )
    (directory / _REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return report


def _clear(directory: Path) -> None:
    """Creates the directory and marks a pair in it as incomplete. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _REPORT).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"directory: {error}") from error


def _search(
    measure: Callable[[float], Agreement], wanted: float, epsilon: float, *, tolerance: float
) -> tuple[float, Agreement]:
    """Finds ε with α within `tolerance` of the wanted one. Returns it and its measurement.

    Secant method on the log-odds of α over log ε. For small ε, 1 - α grows with ε, so the first
    slope is -1. Raises InternalError if it does not converge.
    """
    slope, previous = -1.0, None
    for _ in range(16):
        epsilon = float(f"{epsilon:.4g}")
        agreement = measure(epsilon)
        if abs(agreement.alpha - wanted) <= tolerance:
            return epsilon, agreement
        at = (math.log(epsilon), _log_odds(agreement.alpha))
        if previous and at[0] != previous[0]:
            # Limits to slopes seen in practice: two measurements close together differ mostly by
            # noise.
            slope = min(max((at[1] - previous[1]) / (at[0] - previous[0]), -3.0), -0.5)
        step = (_log_odds(wanted) - at[1]) / slope
        epsilon, previous = epsilon * math.exp(min(max(step, -2.0), 2.0)), at
    raise InternalError(f"found no ε that gives α = {wanted}; last tried: {epsilon:g}")


def _log_odds(alpha: float) -> float:
    alpha = min(max(alpha, 1e-3), 1 - 1e-3)
    return math.log(alpha / (1 - alpha))


def _checked_shape(
    size: str, alpha: float, temperature: float, epsilon: float | None, vocab_size: int | None
) -> PairSize:
    if size not in SIZES:
        raise ConfigError(f"size: {size!r} is unknown; allowed: {', '.join(SIZES)}")
    if not 0.1 <= alpha <= 0.98:
        raise ConfigError(f"alpha: {alpha:g} is out of range; allowed: 0.1 to 0.98")
    if temperature not in (0, 1):
        raise ConfigError(f"temperature: {temperature:g} is not supported; allowed: 0 or 1")
    if epsilon is not None and not 0 <= epsilon <= 1:
        raise ConfigError(f"epsilon: {epsilon:g} is out of range; allowed: 0 to 1")
    if vocab_size is None:
        return SIZES[size]
    if vocab_size < 64:  # fewer cannot have 2 nats of entropy and a real model's peaks
        raise ConfigError(f"vocab_size: {vocab_size} is too small; at least 64")
    return dataclasses.replace(SIZES[size], vocab_size=vocab_size)


def main() -> int:
    """Prints one JSON line per measurement, then the report. Exit status 2: invalid arguments."""
    parser = argparse.ArgumentParser(description="Make a synthetic model pair.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", default="p1")
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--epsilon", type=float, help="Use this ε; do not search for --alpha.")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, help="CPU threads. Default: one per core.")
    arguments = vars(parser.parse_args())
    if num_threads := arguments.pop("num_threads"):
        torch.set_num_threads(num_threads)
    try:
        report = make_pair(
            **arguments, progress=lambda measured: print(json.dumps(measured), flush=True)
        )
    except OutriderError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(json.dumps(dataclasses.asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
