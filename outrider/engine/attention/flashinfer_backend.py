"""FlashInfer backend: attention on CUDA, all sequences of a step in one call per layer.

Owns what is passed to FlashInfer: page tables, one plan per step and kind of attention, and keys
and values in place (FlashInfer's NHD layout is the KV store's: pages of 16 rows of heads). Which
models it can serve is decided in `select.py`.

Written from the documentation and source of flashinfer-python 0.7.2; not yet run on a GPU.
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

# Workspace for partial results of split histories; size recommended by FlashInfer.
_WORKSPACE_BYTES = 128 << 20

NewWrapper = Callable[..., Any]
"""FlashInfer's BatchPrefillWithPagedKVCacheWrapper without its first two arguments."""


class AttentionKind(NamedTuple):
    """Parameters of a plan besides the step; a model has one or two kinds of attention."""

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    dim: int
    window: int | None
    softcap: float | None
    scaling: float | None


class PageTables(NamedTuple):
    """Page tables of a step in FlashInfer's format: int32, on the CPU, where plans are made."""

    query_starts: torch.Tensor
    """[sequences + 1]: packed rows of sequence i are [query_starts[i], query_starts[i + 1])."""
    page_starts: torch.Tensor
    """[sequences + 1]: offsets into `page_ids`."""
    page_ids: torch.Tensor
    last_page_lens: torch.Tensor
    """[sequences]: tokens in the last page, 1 to 16."""

    @classmethod
    def of(cls, store: KVStore, segments: Seq[Segment], num_padding: int = 0) -> PageTables:
        """Tables as after the step. Padding: sequences of one token on the scratch page."""
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
    """FlashInfer wrappers, one per kind of attention, planned for the current step."""

    def __init__(self, device: torch.device, new_wrapper: NewWrapper, **arguments: Any) -> None:
        """`arguments`: passed to every wrapper, in addition to those bound in `new_wrapper`."""
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
        """Start a step: plans are made for these tables from now on.

        FlashInfer copies a plan asynchronously from one pinned buffer and writes the next plan into
        the same buffer. So wait until the device has read the last plan.
        """
        if self._sent is not None:
            self._sent.synchronize()
        self._tables = tables
        self._planned.clear()

    def plan(self, kind: AttentionKind) -> Any:
        """The wrapper of this kind, planned for the current step."""
        if kind not in self._wrappers:
            self._wrappers[kind] = self._new_wrapper(**self._arguments)
        wrapper, tables = self._wrappers[kind], self._tables
        assert tables is not None, "plan called before begin"
        if kind not in self._planned:
            wrapper.plan(
                *tables,
                kind.num_heads,
                kind.num_kv_heads,
                kind.dim,
                PAGE_SIZE,
                causal=True,  # the last query aligns with the last key
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
        """Plan every kind seen so far. A replayed graph does not call `plan` itself."""
        for kind in self._wrappers:
            self.plan(kind)


class FlashInferStep:
    """Attention of one step."""

    def __init__(
        self,
        store: KVStore,
        windows: tuple[int | None, ...],
        attention: PagedAttention,
        slots: torch.Tensor,
    ) -> None:
        """`slots`: int64 [T] on the device, the KV row of each packed token."""
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
        """Store key and value [1, Hkv, T, D]; attend query [1, H, T, D] → [1, T, H, D]."""
        assert call.sinks is None, "FlashInfer does not support attention sinks"
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
    """FlashInfer attention on one device, for the lifetime of an engine."""

    def __init__(
        self, store: KVStore, windows: tuple[int | None, ...], new_wrapper: NewWrapper | None = None
    ) -> None:
        """`new_wrapper`: None uses FlashInfer's, which allocates 128 MiB on the store's device."""
        self.store = store
        self.device = store.keys[0].device
        self._windows = windows
        self._new_wrapper = new_wrapper or _flashinfer_wrappers(self.device)
        self._attention = PagedAttention(self.device, self._new_wrapper)

    def step(self, segments: Seq[Segment]) -> Step:
        """Step for these segments. The previous step must have finished."""
        self._attention.begin(PageTables.of(self.store, segments))
        slots = [self.store.slots(s.sequence, s.past, s.total) for s in segments]
        on_device = torch.from_numpy(np.concatenate(slots)).to(self.device)
        return self.step_with(self._attention, on_device)

    def step_with(self, attention: PagedAttention, slots: torch.Tensor) -> Step:
        """Step with the plans and slots of a caller (`cuda_graphs.py`)."""
        return FlashInferStep(self.store, self._windows, attention, slots)

    def fixed_attention(self, num_sequences: int, max_pages: int) -> PagedAttention:
        """Attention whose plans keep their memory addresses, for CUDA graphs.

        For steps of `num_sequences` sequences with one new token each and at most `max_pages`
        pages.
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
        # With fa2, the sizes in a plan depend only on the number of sequences, as replays need.
        return PagedAttention(
            self.device, self._new_wrapper, use_cuda_graph=True, backend="fa2", **buffers
        )


def _starts(counts: Seq[int]) -> torch.Tensor:
    """int32 [n + 1]: 0 and the cumulative sums."""
    return torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32))


def _flashinfer_wrappers(device: torch.device) -> NewWrapper:
    import flashinfer

    # Used while a call runs only, so all wrappers of one stream may share it.
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def new_wrapper(**arguments: Any) -> Any:
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", **arguments)

    return new_wrapper
