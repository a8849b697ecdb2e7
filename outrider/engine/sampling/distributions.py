"""Token distributions of many rows of logits, and sampling from them.

The device does the work proportional to the vocabulary (`gumbel_max.py`). The few tokens that
matter are finished here with numpy in double precision, so a sample does not depend on the device
or on the other rows of the batch. Blocks of draft tokens are handled in `sampler.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.engine.interface import Ids
from outrider.engine.sampling.gumbel_max import (
    Doubles,
    Excluded,
    Masses,
    RaceCandidates,
    ScaledLogits,
    best,
)
from outrider.sampling import warp
from outrider.sampling.params import SamplingParams
from outrider.sampling.random import token_gumbels

# Top logits read first to find the cut; most top-p sets fit. Otherwise the whole row is sorted.
_HEAD_SIZE = 256
# Error of the float32 bounds: 2**-22 of a scaled logit, and of the logarithm.
_BOUND_ERROR = 1e-4
_RELATIVE_BOUND_ERROR = 1e-6


class RankedTokens(NamedTuple):
    """Tokens in falling order of log-probability + noise, lower id first at ties; both [n, k].

    Scores are float64, -inf for tokens without probability.
    """

    ids: Ids
    scores: Doubles


def with_noise(ranking: RankedTokens, keys: Ids) -> RankedTokens:
    """Re-rank tokens ranked without noise by adding the noise of `keys`, int64 [n]."""
    return _ranking(ranking.ids, ranking.scores + token_gumbels(keys, ranking.ids))


class Distributions:
    """One distribution per row of `logits` float32 [n, vocab], which are adjusted already.

    `params` [n], temperature > 0. `excluded` tokens are left out of `tails` and of Gumbel-max
    races, not out of the distributions.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        excluded: Excluded | None = None,
    ) -> None:
        self._logits = logits
        self._temperatures = np.array([p.temperature for p in params])
        self._floors = _floors(logits, self._temperatures, params)
        self._scaled_logits = ScaledLogits(logits, self._temperatures, self._floors, excluded)
        self._masses: Masses | None = None

    @property
    def masses(self) -> Masses:
        """Peak and masses of each row, computed once."""
        if self._masses is None:
            self._masses = self._scaled_logits.masses()
        return self._masses

    @property
    def tails(self) -> Doubles:
        """Tail mass, float64 [n]: the probability of all tokens that are not excluded."""
        return self.masses.tails / self._kept_mass

    @property
    def _kept_mass(self) -> Doubles:
        # The peak has weight 1, so a smaller sum means that the row allows no token.
        return np.maximum(self.masses.kept, 1.0)

    def logprobs_at(self, rows: Ids, columns: Ids) -> Doubles:
        """Float64 log-probabilities of single entries; -inf for those that are cut off."""
        logits = (
            self._logits[_to_device(rows, self._logits), _to_device(columns, self._logits)]
            .cpu()
            .numpy()
        )
        return self._logprobs(rows, logits)

    def top(self, num: int) -> RankedTokens:
        """The `num` most likely tokens, without noise."""
        values, ids = (part.cpu().numpy() for part in best(self._logits, num))
        rows = np.arange(len(ids))[:, None]
        return _ranking(ids, self._logprobs(rows, values))

    def race(self, keys: Ids, num: int, width: int) -> RankedTokens:
        """The best `num` tokens by Gumbel-max (log-probability + noise of `keys`, int64 [n]).

        Per row, `width` > `num` candidates are scored exactly. If their bounds cannot rule out that
        another token wins, every token of the row is scored exactly.
        """
        self._masses, candidates = self._scaled_logits.race(keys, width)
        ranking = self._ranked(np.arange(len(keys)), keys, candidates)
        if candidates.ids.shape[-1] < self._logits.shape[-1]:
            lowest = ranking.scores[:, num - 1] + np.log(self._kept_mass)
            for row in np.flatnonzero(_may_miss(lowest, candidates.bounds[:, -1])).tolist():
                alone = self._scaled_logits.full_race(row, int(keys[row]), width)
                ids, scores = self._ranked(np.array([row]), keys[row : row + 1], alone)
                ranking.ids[row], ranking.scores[row] = ids[0], scores[0]
        return RankedTokens(ranking.ids[:, :num], ranking.scores[:, :num])

    def _ranked(self, rows: Ids, keys: Ids, candidates: RaceCandidates) -> RankedTokens:
        """Candidates ranked by their exact scores."""
        ids = candidates.ids
        logprobs = self.logprobs_at(np.repeat(rows, ids.shape[-1]), ids.reshape(-1))
        scores = logprobs.reshape(ids.shape) + token_gumbels(keys, ids)
        scores[(candidates.bounds == -np.inf) | np.isnan(scores)] = -np.inf
        return _ranking(ids, scores)

    def _logprobs(self, rows: Ids, logits: npt.NDArray[np.float32]) -> Doubles:
        scaled = logits.astype(np.float64) / self._temperatures[rows] - self.masses.peaks[rows]
        if self._floors is not None:
            scaled = np.where(scaled >= self._floors[rows], scaled, -np.inf)
        return np.asarray(scaled - np.log(self._kept_mass)[rows])


def _ranking(ids: Ids, scores: Doubles) -> RankedTokens:
    order = np.lexsort((ids, -scores))
    return RankedTokens(np.take_along_axis(ids, order, -1), np.take_along_axis(scores, order, -1))


def _may_miss(lowest: Doubles, bounds: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether a token beyond the last bound might score more than the lowest token compared."""
    is_open = bounds > -np.inf  # otherwise all tokens with probability > 0 are candidates
    known = np.where(is_open, bounds, 0.0)
    slack = _BOUND_ERROR + _RELATIVE_BOUND_ERROR * np.abs(known)
    return is_open & ~(lowest >= known + slack)


def _floors(
    logits: torch.Tensor, temperatures: Doubles, params: Sequence[SamplingParams]
) -> Doubles | None:
    """Float64 [n]: smallest (scaled logit - peak) after min_p, top_k, top_p; None: no cut."""
    rows = np.array([i for i, p in enumerate(params) if warp.cuts_off(p)], np.int64)
    if not len(rows):
        return None
    floors = np.full(len(params), -np.inf)
    # A GPU sorts whole rows. On a CPU, selecting the head of a row is a hundred times cheaper.
    on_cpu, size = logits.device.type == "cpu", logits.shape[-1]
    limits = [p.top_k for p in params if p.top_k < size]
    num_first = min(size, max([_HEAD_SIZE, *limits])) if on_cpu else size
    for num in (num_first, size):
        some = logits.index_select(0, _to_device(rows, logits))
        cuts = _cuts([params[i] for i in rows.tolist()])
        found, is_found = _floors_from_heads(some, temperatures[rows], cuts, num)
        floors[rows] = found
        rows = rows[~is_found]
        if num == size or not len(rows):
            break
    return floors


def _cuts(params: Sequence[SamplingParams]) -> warp.Cuts:
    columns = (
        np.array([warp.log_min_p(p) for p in params]),
        np.array([p.top_k for p in params], np.int64),
        np.array([p.top_p for p in params]),
    )
    return warp.Cuts(*(column[:, None] for column in columns))


def _floors_from_heads(
    logits: torch.Tensor, temperatures: Doubles, cuts: warp.Cuts, num: int
) -> tuple[Doubles, npt.NDArray[np.bool_]]:
    """Floors from the top `num` logits of each row, and whether those were enough."""
    values, _ = best(logits, num)
    cuts = warp.Cuts(*(torch.from_numpy(column).to(logits.device) for column in cuts))
    scale = torch.from_numpy(temperatures).to(logits.device)[:, None]
    ordered = warp.scale(values, scale)
    limits = warp.limit_floor(ordered, cuts)
    mass = torch.ones_like(limits)
    if bool((cuts.top_p < 1).any()):
        kept = ScaledLogits(logits, temperatures, limits[:, 0].cpu().numpy()).masses().kept
        mass = torch.from_numpy(kept).to(logits.device)[:, None]
    floors, is_found = warp.nucleus_floor(ordered, limits, mass, cuts)
    return floors[:, 0].cpu().numpy(), is_found[:, 0].cpu().numpy()


def _to_device(ids: Ids, like: torch.Tensor) -> torch.Tensor:
    """Indices as an int64 tensor on the device of `like`."""
    return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(like.device)
