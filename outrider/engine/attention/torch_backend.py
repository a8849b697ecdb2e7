"""Torch backend: attention of one forward step by torch's kernels, sequence by sequence.

Owns the plan of a step (packed rows, masks and KV slots of each sequence) and executes it for every
layer.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from outrider.engine.attention.interface import LayerCall, QueryBlock, attend_explicit, attend_fused
from outrider.engine.attention.segments import OnDevices, Segment
from outrider.engine.attention.shared_prefix import group_branches
from outrider.engine.kv.store import PAGE_SIZE, KVStore

# Larger masks are recomputed for every layer instead of cached for the step.
_MAX_CACHED_MASK_BYTES = 32 << 20


class TorchBackend:
    """Attention by torch's own kernels, on any device."""

    def __init__(self, store: KVStore, windows: tuple[int | None, ...]) -> None:
        """`windows`: per layer, from the configuration; a window that the model passes wins."""
        self._store = store
        self._windows = windows

    def step(self, segments: Seq[Segment]) -> PackedStep:
        """Move scattered sequences to consecutive pages where possible, then plan the step."""
        for segment in segments:
            self._store.compact(segment.sequence)
        return PackedStep(self._store, segments, self._windows)


class PackedStep:
    """Attention of one step. Created for it and discarded after it."""

    def __init__(
        self, store: KVStore, segments: Seq[Segment], windows: tuple[int | None, ...]
    ) -> None:
        self._store = store
        self._windows = windows
        self._separate, self._branches = group_branches(store, segments)
        self._order = self._find_order() if self._branches else None
        self._blocks: dict[int | None, list[tuple[Segment, QueryBlock]]] = {}
        self._masks: dict[
            tuple[QueryBlock, int, torch.dtype, torch.device], torch.Tensor | None
        ] = {}
        self._slots = OnDevices(
            np.concatenate([store.slots(s.sequence, s.past, s.total) for s in segments])
        )
        self._pages: dict[tuple[int, torch.device], torch.Tensor] = {}

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """Store key and value [1, Hkv, T, D]; attend query [1, H, T, D] → [1, T, H, Dv]."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        window = self._windows[layer] if call.window is None else call.window
        keys, values = self._store.keys[layer], self._store.values[layer]
        slots = self._slots.get(keys.device)
        keys.index_copy_(0, slots, key[0].transpose(0, 1))
        values.index_copy_(0, slots, value[0].transpose(0, 1))
        outs = [
            self._attend_block(segment, block, query, (keys, values), call)
            for segment, block in self._blocks_with(window)
        ]
        outs += [b.attend(query, (keys, values), call, window) for b in self._branches]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        if self._order is not None:
            out = out.index_select(0, self._order.get(out.device))
        return out[None]

    def _find_order(self) -> OnDevices | None:
        """Index of each packed row in the order of computation: separate segments, then groups."""
        separate = [np.arange(s.start, s.stop) for s in self._separate]
        rows = np.concatenate([*separate, *(b.rows for b in self._branches)])
        return None if np.array_equal(rows, np.arange(rows.size)) else OnDevices(np.argsort(rows))

    def _blocks_with(self, window: int | None) -> list[tuple[Segment, QueryBlock]]:
        """Query blocks of all separate segments for this window."""
        if window not in self._blocks:
            self._blocks[window] = [(s, b) for s in self._separate for b in s.blocks(window)]
        return self._blocks[window]

    def _attend_block(
        self,
        segment: Segment,
        block: QueryBlock,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        call: LayerCall,
    ) -> torch.Tensor:
        """Attend one block of one segment: [block tokens, H, Dv]."""
        key = self._history(segment, block, cache[0])
        value = self._history(segment, block, cache[1])
        num_heads, dim = query.shape[1], query.shape[3]
        num_kv_heads = key.shape[0]
        group = num_heads // num_kv_heads
        count = block.last - block.first + 1
        row = segment.start + block.first - segment.past
        folded = query[0, :, row : row + count].reshape(num_kv_heads, group * count, dim)
        mask = self._mask(block, group, query)
        if call.softcap is None and call.sinks is None:
            out = attend_fused(folded, key, value, mask, call.scaling)
        else:
            out = attend_explicit(folded, key, value, mask, call)
        return out.reshape(num_heads, count, -1).transpose(0, 1)

    def _history(self, segment: Segment, block: QueryBlock, cache: torch.Tensor) -> torch.Tensor:
        """Keys or values [first_key, last] of a sequence, [Hkv, keys, D]; a view if possible."""
        run_start = segment.sequence.run_start
        if run_start is not None:
            rows = cache[run_start + block.first_key : run_start + block.last + 1]
        else:
            first_page = block.first_key // PAGE_SIZE
            pages = self._pages_on(segment, cache.device)
            pages = pages[first_page : block.last // PAGE_SIZE + 1]
            paged = cache.view(-1, PAGE_SIZE, *cache.shape[1:]).index_select(0, pages)
            offset = first_page * PAGE_SIZE
            rows = paged.flatten(0, 1)[block.first_key - offset : block.last + 1 - offset]
        return rows.transpose(0, 1)

    def _mask(self, block: QueryBlock, group: int, query: torch.Tensor) -> torch.Tensor | None:
        cache_key = (block, group, query.dtype, query.device)
        if cache_key in self._masks:
            return self._masks[cache_key]
        mask = block.mask(group, query.dtype, query.device)
        if mask is None or mask.nbytes <= _MAX_CACHED_MASK_BYTES:
            self._masks[cache_key] = mask
        return mask

    def _pages_on(self, segment: Segment, device: torch.device) -> torch.Tensor:
        cache_key = (segment.start, device)
        if cache_key not in self._pages:
            pages = self._store.page_ids(segment.sequence, segment.total)
            self._pages[cache_key] = torch.from_numpy(pages).to(device)
        return self._pages[cache_key]
