"""Kernels over many rows of logits on their device: maxima, masses and Gumbel-max races.

A Gumbel-max race samples from softmax(x): the winner is argmax(x + Gumbel noise). Rows are
processed in blocks that fit a core's cache; the result of a row does not depend on other rows. Call
them on the device thread only, in inference mode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.engine.interface import Ids
from outrider.sampling.random import token_bounds, token_gumbels, token_offsets

Doubles = npt.NDArray[np.float64]

# Entries per block. On a CPU, the temporaries of a block (about 24 bytes an entry) fit the L2 cache
# of a core, and each torch thread gets this many entries of an element-wise operation. On other
# devices it only bounds memory (0.4 GB).
_CPU_BLOCK = 32768
_DEVICE_BLOCK = 1 << 24
# Scores held at once (16 MB), so that one selection covers many rows.
_SLAB = 1 << 22
# Shorter rows are selected from in one step: two would not pay.
_LONG_ROW = 1024


_Weighed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Excluded(NamedTuple):
    """Entries left out of tails and races: int64 [m] each, `rows` in non-decreasing order."""

    rows: Ids
    columns: Ids


class Masses(NamedTuple):
    """Per row, float64 [n]: the greatest scaled logit, and sums of exp(scaled - peak).

    `kept`: sum over all entries at or above the floor. `tails`: of those, the entries not excluded.
    """

    peaks: Doubles
    kept: Doubles
    tails: Doubles


class RaceCandidates(NamedTuple):
    """Tokens that may win a race: `ids` int64 [n, width] by falling float32 score `bounds`.

    A score is scaled logit - peak + Gumbel noise. No other token exceeds the last bound. A bound of
    -inf: the token has no probability.
    """

    ids: Ids
    bounds: npt.NDArray[np.float32]


def first_max(scores: torch.Tensor) -> Ids:
    """int64 [n]: index of each row's maximum, the first one at ties, as torch's argmax."""
    if scores.device.type == "cpu":  # numpy's argmax is ten times faster, with the same result
        return np.asarray(scores.numpy().argmax(-1))
    return np.asarray(scores.argmax(-1).cpu().numpy())


def best(scores: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest `num` entries of each row in falling order, and their ids; at most all entries.

    On a CPU the row is viewed as a grid. Only the `num` columns with the greatest maxima can hold
    them, so only those columns are searched.
    """
    num_rows, size = scores.shape
    num = min(num, size)
    length = math.isqrt(size // num)
    if scores.device.type != "cpu" or size < _LONG_ROW or length < 2:
        top = scores.topk(num)
        return top.values, top.indices
    width = size // length
    whole = length * width
    columns = scores[:, :whole].view(num_rows, length, width).amax(1).topk(num).indices
    steps = torch.arange(0, whole, width)
    rest = torch.arange(whole, size).expand(num_rows, -1)
    ids = torch.cat([(columns[:, None, :] + steps[:, None]).flatten(1), rest], -1)
    top = scores.gather(-1, ids).topk(num)
    return top.values, ids.gather(-1, top.indices)


class ScaledLogits:
    """Rows of logits with their temperatures and floors, for masses and races.

    `logits` float32 [n, vocab]; `temperatures` float64 [n]; `floors` float64 [n] or None: entries
    whose (scaled logit - peak) is below the floor are cut off.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        temperatures: Doubles,
        floors: Doubles | None = None,
        excluded: Excluded | None = None,
    ) -> None:
        self._logits = logits
        self._size = logits.shape[-1]
        device = logits.device
        self._temperatures = torch.from_numpy(temperatures).to(device)[:, None]
        self._floors = None if floors is None else torch.from_numpy(floors).to(device)[:, None]
        entries = excluded or Excluded(np.zeros(0, np.int64), np.zeros(0, np.int64))
        flat = torch.from_numpy(entries.rows * self._size + entries.columns)
        self._excluded = flat.to(device)
        self._starts = np.searchsorted(entries.rows, np.arange(len(logits) + 1)).tolist()

    def masses(self) -> Masses:
        """Masses of all rows, without a race."""
        blocks = self._slices(slice(0, len(self._logits)), _block_size(self._logits))
        return _gathered([self._weigh(block, None) for block in blocks])

    def race(self, keys: Ids, width: int) -> tuple[Masses, RaceCandidates]:
        """Masses, and the top `width` candidates of each row. `keys` int64 [n]: noise keys."""
        masses, values, ids = [], [], []
        for slab in self._slices(slice(0, len(self._logits)), _SLAB):
            scores = self._logits.new_empty(slab.stop - slab.start, self._size)
            for block in self._slices(slab, _block_size(self._logits)):
                block_scores = scores[block.start - slab.start : block.stop - slab.start]
                masses.append(self._weigh(block, block_scores))
                _add_bounds(block_scores, keys[block])
            bounds, candidates = best(scores, width)
            values.append(bounds)
            ids.append(candidates)
        return _gathered(masses), RaceCandidates(_joined(ids), _joined(values))

    def full_race(self, row: int, key: int, width: int) -> RaceCandidates:
        """Candidates of one row with every score in double precision: slow, always exact."""
        block = slice(row, row + 1)
        scaled, _ = self._scaled(block)
        scaled.view(-1).index_fill_(0, self._excluded_in(block), -torch.inf)
        device = self._logits.device
        keys = torch.tensor([key], dtype=torch.int64, device=device)
        scaled += token_gumbels(keys, torch.arange(self._size, device=device))
        top = scaled.topk(min(width, self._size))
        return RaceCandidates(top.indices.cpu().numpy(), top.values.to(torch.float32).cpu().numpy())

    def _slices(self, rows: slice, num_entries: int) -> Iterator[slice]:
        """Slices of `rows`, each of at most `num_entries` entries (at least one row)."""
        step = max(1, num_entries // self._size)
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))

    def _scaled(self, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 [rows, vocab], a new tensor with -inf below the floor; and the peaks [rows, 1].

        Division is monotone, so this equals `warp.scale` bit for bit.
        """
        logits, temperatures = self._logits[block], self._temperatures[block]
        peaks = logits.amax(-1, keepdim=True).to(torch.float64) / temperatures
        # A row of -inf stays -inf instead of NaN.
        peaks = torch.where(peaks.isfinite(), peaks, 0.0)
        scaled = logits.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
        scaled /= temperatures
        scaled -= peaks
        if self._floors is not None:
            scaled.masked_fill_(scaled < self._floors[block], -torch.inf)
        return scaled, peaks

    def _weigh(self, block: slice, scores: torch.Tensor | None) -> _Weighed:
        """Peaks, kept masses, tails [rows]; writes scaled logits to `scores`, -inf if excluded."""
        scaled, peaks = self._scaled(block)
        ids = self._excluded_in(block)
        if scores is not None:
            scores.copy_(scaled)
            scores.view(-1).index_fill_(0, ids, -torch.inf)
        weights = scaled.exp_()
        kept = weights.sum(-1)
        if not len(ids):
            return peaks[:, 0], kept, kept
        weights.view(-1).index_fill_(0, ids, 0.0)
        return peaks[:, 0], kept, weights.sum(-1)

    def _excluded_in(self, block: slice) -> torch.Tensor:
        """Flat indices, within the block, of its excluded entries."""
        first, last = self._starts[block.start], self._starts[block.stop]
        return torch.sub(self._excluded[first:last], block.start * self._size)


def _add_bounds(scores: torch.Tensor, keys: Ids) -> None:
    """Add the upper bound of the noise to float32 [rows, vocab], in place."""
    size, device = scores.shape[-1], scores.device
    offsets = _offsets(size, device)
    # On one thread numpy hashes twice as fast, with the same bits; torch uses several threads.
    by_numpy = device.type == "cpu" and torch.get_num_threads() == 1
    noise_keys = keys if by_numpy else torch.from_numpy(keys).to(device)
    step = max(1, _block_size(scores) // len(keys))
    for start in range(0, size, step):
        columns = slice(start, start + step)
        if by_numpy:
            bounds = torch.from_numpy(token_bounds(noise_keys, offsets.numpy()[columns]))
        else:
            bounds = token_bounds(noise_keys, offsets[columns])
        scores[:, columns].sub_(bounds.log_())


@functools.lru_cache(maxsize=4)
def _offsets(size: int, device: torch.device) -> torch.Tensor:
    """Hash offsets of all token ids; a constant of the vocabulary's size."""
    return torch.as_tensor(token_offsets(torch.arange(size, device=device)))


def _gathered(parts: Sequence[_Weighed]) -> Masses:
    return Masses(*(_joined(column) for column in zip(*parts, strict=True)))


def _joined(parts: Sequence[torch.Tensor]) -> npt.NDArray[Any]:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).cpu().numpy()


def _block_size(tensor: torch.Tensor) -> int:
    """Entries per block on the device of `tensor`."""
    return _CPU_BLOCK * torch.get_num_threads() if tensor.device.type == "cpu" else _DEVICE_BLOCK
