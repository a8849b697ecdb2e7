"""Attention of forks with a common prefix: the prefix is read in place, once for all forks.

Owns the grouping of a step's forks and the mathematics of one group. A fork shares its parent's
pages up to the fork point, so the rows of the prefix are consecutive and the same for every fork.
The queries of all forks are folded into one call over the prefix. What each fork has of its own
(its tail) is short: all tails are gathered into a second call. The two results are merged by their
log-sum-exp. Sequences whose rows are all consecutive are attended in `torch_backend.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq

import numpy as np
import torch

from outrider.engine.attention.interface import HIDDEN, LayerCall, attend_part, merge_parts
from outrider.engine.attention.segments import OnDevices, Segment
from outrider.engine.kv.store import PAGE_SIZE, KVStore

# Forks with more new tokens are attended separately: more than a verification has, so a prompt
# chunk, for which one gather is cheap.
_MAX_TOKENS = 16

# Shorter prefixes do not pay for a call of their own.
_MIN_PREFIX = 64

# Forks of one parent are attended together if their lengths are similar: prefixes in the same
# bucket of this many pages, and tails within a factor of two above this many tokens. Tails are
# padded to the longest.
_PREFIX_BUCKET_PAGES = 8
_TAIL_BUCKET_TOKENS = 64


class ForkedSegments:
    """Segments with equally many new tokens; their sequences begin with the same KV rows."""

    def __init__(self, store: KVStore, segments: Seq[Segment]) -> None:
        self.rows = np.concatenate([np.arange(s.start, s.stop) for s in segments])
        """Packed rows of the step, member by member."""
        self._count = segments[0].stop - segments[0].start
        self._first_row = segments[0].sequence.first_row
        self._prefix_len = min(_prefix_len(s) for s in segments)
        self._positions = np.stack([np.arange(s.past, s.total) for s in segments])
        self._rows_on = OnDevices(self.rows)
        self._tail_len = int(self._positions.max()) + 1 - self._prefix_len
        self._tail_slots = OnDevices(self._slots(store, segments))
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}

    def attend(
        self,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        call: LayerCall,
        window: int | None,
    ) -> torch.Tensor:
        """query [1, H, T, D], the layer's K and V [rows, Hkv, D] → [members * tokens, H, Dv]."""
        num_heads, num_kv_heads = query.shape[1], cache[0].shape[1]
        group, members = num_heads // num_kv_heads, len(self._positions)
        packed = query[0].index_select(1, self._rows_on.get(query.device))
        folded = packed.view(num_kv_heads, group, members, self._count, query.shape[3])
        out, log_sum = self._attend_tails(folded, cache, call, window)
        if self._first_key(window) < self._prefix_len:
            prefix = self._attend_prefix(folded, cache, call, window)
            out, log_sum = merge_parts(prefix, (out, log_sum))
        if call.sinks is not None:
            sinks = call.sinks.float().view(num_kv_heads, group)
            out = out * torch.sigmoid(log_sum - sinks)[..., None].to(out.dtype)
        return out.reshape(members * self._count, num_heads, -1)

    def _attend_tails(
        self,
        folded: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        call: LayerCall,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to each member's keys after the prefix: [members, tokens, Hkv, group, (Dv)]."""
        num_kv_heads, group, members, count, dim = folded.shape
        query = folded.permute(2, 0, 1, 3, 4).reshape(members, num_kv_heads, group * count, dim)
        slots = self._tail_slots.get(folded.device)
        key, value = (
            rows.index_select(0, slots)
            .view(members, self._tail_len, num_kv_heads, -1)
            .transpose(1, 2)
            for rows in cache
        )
        columns = np.arange(self._prefix_len, self._prefix_len + self._tail_len)
        mask = self._mask("tail", self._positions[:, :, None], columns, window, folded)
        out, log_sum = attend_part(query, key, value, mask, call)
        shape = (members, num_kv_heads, group, count)
        return (
            out.view(*shape, -1).permute(0, 3, 1, 2, 4),
            log_sum.reshape(shape).permute(0, 3, 1, 2),
        )

    def _attend_prefix(
        self,
        folded: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        call: LayerCall,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to the rows that all members share: [members, tokens, Hkv, group, (Dv)]."""
        num_kv_heads, group, members, count, dim = folded.shape
        first_key = self._first_key(window)
        start, stop = self._first_row + first_key, self._first_row + self._prefix_len
        key, value = (rows[start:stop].transpose(0, 1)[None] for rows in cache)
        query = folded.reshape(1, num_kv_heads, group * members * count, dim)
        columns = np.arange(first_key, self._prefix_len)
        mask = self._mask("prefix", self._positions.reshape(1, -1, 1), columns, window, folded)
        out, log_sum = attend_part(query, key, value, mask, call)
        shape = (num_kv_heads, group, members, count)
        return (
            out.view(*shape, -1).permute(2, 3, 0, 1, 4),
            log_sum.reshape(shape).permute(2, 3, 0, 1),
        )

    def _mask(
        self,
        part: str,
        rows: np.ndarray,
        columns: np.ndarray,
        window: int | None,
        folded: torch.Tensor,
    ) -> torch.Tensor | None:
        """float32 [batch, 1, group * rows, keys] for positions `rows` [batch, rows, 1].

        None if all keys are visible. Not in the model's dtype: HIDDEN would be infinite in float16.
        """
        group = folded.shape[1]
        cache_key = (part, window, group, folded.device)
        if cache_key not in self._masks:
            hidden = columns > rows
            if window is not None:
                hidden |= columns <= rows - window
            mask = np.where(np.tile(hidden, (1, group, 1)), np.float32(HIDDEN), np.float32(0))
            tensor = torch.from_numpy(mask[:, None]).to(folded.device)
            self._masks[cache_key] = tensor if hidden.any() else None
        return self._masks[cache_key]

    def _first_key(self, window: int | None) -> int:
        """The first position visible to any member."""
        return 0 if window is None else max(0, int(self._positions.min()) + 1 - window)

    def _slots(self, store: KVStore, segments: Seq[Segment]) -> np.ndarray:
        """KV rows of the tails; each is padded to the longest one with its own last row."""
        slots = np.empty((len(segments), self._tail_len), dtype=np.int64)
        for row, segment in zip(slots, segments, strict=True):
            own = store.slots(segment.sequence, self._prefix_len, segment.total)
            row[: own.size] = own
            row[own.size :] = own[-1]
        return slots.reshape(-1)


def group_branches(
    store: KVStore, segments: Seq[Segment]
) -> tuple[list[Segment], list[ForkedSegments]]:
    """Split segments into those attended separately and groups of forks."""
    separate: list[Segment] = []
    groups: dict[tuple[int, ...], list[Segment]] = defaultdict(list)
    for segment in segments:
        sequence, count = segment.sequence, segment.stop - segment.start
        prefix_len = _prefix_len(segment)
        if sequence.run_start is not None or count > _MAX_TOKENS or prefix_len < _MIN_PREFIX:
            separate.append(segment)
            continue
        tail_bucket = max(segment.total - prefix_len, _TAIL_BUCKET_TOKENS).bit_length()
        prefix_bucket = prefix_len // (_PREFIX_BUCKET_PAGES * PAGE_SIZE)
        groups[sequence.first_row, count, prefix_bucket, tail_bucket].append(segment)
    return separate, [ForkedSegments(store, members) for members in groups.values()]


def _prefix_len(segment: Segment) -> int:
    """Cached tokens in consecutive rows, from the first on."""
    return min(segment.sequence.num_leading * PAGE_SIZE, segment.past)
