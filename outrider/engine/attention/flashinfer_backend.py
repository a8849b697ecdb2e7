"""Attention on CUDA through FlashInfer: all sequences of a step in one call per layer.

Owns what FlashInfer is told: page tables, one plan per step and kind of attention, and keys and
values in place (its NHD layout is the KV store's own: pages of 16 rows of heads). Which models
it can serve is chosen elsewhere (backends.py). Knows nothing about models or logits.

Written from the documentation and source of flashinfer-python 0.7.2; no device has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
import torch

from outrider.engine.attention.interface import LayerCall, Step
from outrider.engine.attention.segments import Segment
from outrider.engine.kv.store import PAGE_SIZE, KVStore

# What FlashInfer recommends for partial results of split histories.
_WORKSPACE_BYTES = 128 << 20

NewWrapper = Callable[..., Any]
"""As FlashInfer's BatchPrefillWithPagedKVCacheWrapper without its first two arguments."""


class AttentionKind(NamedTuple):
    """What a plan depends on besides the step; a model has one or two kinds of attention."""

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    dim: int
    window: int | None
    softcap: float | None
    scaling: float | None


class PageTables(NamedTuple):
    """A step's sequences as FlashInfer reads them: int32, on the CPU, where plans are made."""

    query_starts: torch.Tensor
    """[sequences + 1]: each one's packed rows are [its start, the next one's)."""
    page_starts: torch.Tensor
    """[sequences + 1], into `page_ids`."""
    page_ids: torch.Tensor
    last_page_lens: torch.Tensor
    """[sequences]: tokens in the last page, 1 to 16."""

    @classmethod
    def of(cls, store: KVStore, segments: Seq[Segment], num_padding: int = 0) -> PageTables:
        """As the step leaves them; padding is sequences of one token on the scratch page."""
        pages = [store.page_ids(s.sequence, s.total) for s in segments]
        pages += [np.array([store.scratch_page], dtype=np.int32)] * num_padding
        totals = np.array([s.total for s in segments] + [1] * num_padding)
        counts = [s.stop - s.start for s in segments] + [1] * num_padding
        return cls(
            _starts(counts),
            _starts([p.size for p in pages]),
            torch.from_numpy(np.concatenate(pages)),
            torch.from_numpy(((totals - 1) % PAGE_SIZE + 1).astype(np.int32)),
        )


class PagedAttention:
    """FlashInfer's wrappers, one for each kind of attention, planned for the step under way."""

    def __init__(self, device: torch.device, new_wrapper: NewWrapper, **arguments: Any) -> None:
        """arguments: to every wrapper, beside what `new_wrapper` gives it."""
        self._device = device
        self._new_wrapper = new_wrapper
        self._arguments = arguments
        self._sent: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._wrappers: dict[AttentionKind, Any] = {}
        self._planned: set[AttentionKind] = set()
        self._tables: PageTables | None = None

    def begin(self, tables: PageTables) -> None:
        """The calls from here on are of this step.

        FlashInfer sends a plan from one pinned buffer without waiting, and writes the next plan
        over it: not before the device has read the last one.
        """
        if self._sent is not None:
            self._sent.synchronize()
        self._tables = tables
        self._planned.clear()

    def plan(self, kind: AttentionKind) -> Any:
        """The wrapper of this kind, ready for the step."""
        if kind not in self._wrappers:
            self._wrappers[kind] = self._new_wrapper(**self._arguments)
        wrapper, tables = self._wrappers[kind], self._tables
        assert tables is not None, "a plan without a step"
        if kind not in self._planned:
            wrapper.plan(
                *tables,
                kind.num_heads,
                kind.num_kv_heads,
                kind.dim,
                PAGE_SIZE,
                causal=True,  # the last query is at the last key
                sm_scale=kind.scaling,
                window_left=-1 if kind.window is None else kind.window - 1,
                logits_soft_cap=kind.softcap,
                q_data_type=kind.dtype,
                kv_data_type=kind.dtype,
            )
            self._planned.add(kind)
            if self._sent is not None:
                self._sent.record(torch.cuda.current_stream(self._device))
        return wrapper

    def plan_all(self) -> None:
        """Plans every kind seen so far: a replayed graph does not come back to ask."""
        for kind in self._wrappers:
            self.plan(kind)


class FlashInferStep:
    """Carries the attention of one step."""

    def __init__(
        self,
        store: KVStore,
        windows: tuple[int | None, ...],
        attention: PagedAttention,
        slots: torch.Tensor,
    ) -> None:
        """slots: int64 [T] on the device, the row of the KV memory for each packed token."""
        self._store = store
        self._windows = windows
        self._attention = attention
        self._slots = slots

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """Caches key and value [1, Hkv, T, D], attends query [1, H, T, D] → [1, T, H, D]."""
        assert call.sinks is None, "a model with sinks was given to FlashInfer"
        layer: int = module.layer_idx  # type: ignore[assignment]
        keys, values = self._store.keys[layer], self._store.values[layer]
        keys.index_copy_(0, self._slots, key[0].transpose(0, 1))
        values.index_copy_(0, self._slots, value[0].transpose(0, 1))
        window = self._windows[layer] if call.window is None else call.window
        _, num_heads, _, dim = query.shape
        kind = AttentionKind(
            query.dtype, num_heads, keys.shape[1], dim, window, call.softcap, call.scaling
        )
        pages = (-1, PAGE_SIZE, *keys.shape[1:])
        out: torch.Tensor = self._attention.plan(kind).run(
            query[0].transpose(0, 1).contiguous(), (keys.view(pages), values.view(pages))
        )
        return out[None]


class FlashInferBackend:
    """Makes steps for one device; the engine's for as long as it lives."""

    def __init__(
        self, store: KVStore, windows: tuple[int | None, ...], new_wrapper: NewWrapper | None = None
    ) -> None:
        """new_wrapper: None for FlashInfer's own, which allocates 128 MiB on the store's device."""
        self.store = store
        self.device = store.keys[0].device
        self._windows = windows
        self._new_wrapper = new_wrapper or _flashinfer_wrappers(self.device)
        self._attention = PagedAttention(self.device, self._new_wrapper)

    def step(self, segments: Seq[Segment]) -> Step:
        """The step of these segments; the one before it must have been carried out."""
        self._attention.begin(PageTables.of(self.store, segments))
        slots = [self.store.slots(s.sequence, s.past, s.total) for s in segments]
        on_device = torch.from_numpy(np.concatenate(slots)).to(self.device)
        return self.step_with(self._attention, on_device)

    def step_with(self, attention: PagedAttention, slots: torch.Tensor) -> Step:
        """A step whose plans and slots are someone else's (graphs.py)."""
        return FlashInferStep(self.store, self._windows, attention, slots)

    def fixed_attention(self, num_sequences: int, max_pages: int) -> PagedAttention:
        """Plans that always lie in the same memory, for CUDA graphs.

        For steps of `num_sequences` sequences of one new token and `max_pages` pages in all.
        """
        sizes = {
            "qo_indptr_buf": num_sequences + 1,
            "paged_kv_indptr_buf": num_sequences + 1,
            "paged_kv_indices_buf": max_pages,
            "paged_kv_last_page_len_buf": num_sequences,
        }
        buffers = {
            name: torch.zeros(size, dtype=torch.int32, device=self.device)
            for name, size in sizes.items()
        }
        # fa2 keeps every size in a plan the same for one number of sequences, as replays need.
        return PagedAttention(
            self.device, self._new_wrapper, use_cuda_graph=True, backend="fa2", **buffers
        )


def _starts(counts: Seq[int]) -> torch.Tensor:
    """int32 [n + 1]: 0 and the running sums."""
    return torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32))


def _flashinfer_wrappers(device: torch.device) -> NewWrapper:
    import flashinfer

    # Used while a call runs only, so all wrappers of one stream may share it.
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def new_wrapper(**arguments: Any) -> Any:
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", **arguments)

    return new_wrapper
