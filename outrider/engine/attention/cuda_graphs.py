"""CUDA graphs of steps with one token per sequence, the most frequent step of a draft.

A small model's step spends more time in Python and kernel launches than on the device; a graph is
launched once. Owns the captured steps, one per padded number of sequences, and the memory they read
and write. Steps that cannot be captured run ungraphed. Call it on the device thread, in inference
mode.

Written from the documentation of torch and FlashInfer; not yet run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from outrider.engine.attention.flashinfer_backend import FlashInferBackend, PageTables
from outrider.engine.attention.interface import attending
from outrider.engine.attention.segments import Segment
from outrider.engine.kv.store import PAGE_SIZE
from outrider.engine.loading.loaded_model import BoundModel

_log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)

# Uncaptured runs before a capture, so that everything created at first use exists.
_WARM_UPS = 2

Run = Callable[[], torch.Tensor]


def capture(run: Run, device: torch.device) -> Run:
    """Capture `run`, whose inputs and output keep their memory, and return its replay."""
    current = torch.cuda.current_stream(device)
    # A failed capture leaves its own stream current. This context restores the original one.
    with torch.cuda.stream(current):
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # No other thread uses the device. The stream is passed explicitly: torch would create its
        # own once, on the device that is current at that time.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


class GraphedSteps:
    """Captures a step at the first use of its batch size and replays it afterwards."""

    def __init__(
        self,
        model: BoundModel,
        backend: FlashInferBackend,
        capture: Callable[[Run, torch.device], Run] = capture,
    ) -> None:
        self._model = model
        self._backend = backend
        self._capture = capture
        self._steps: dict[int, _FixedStep] = {}
        self.failed = False
        """Whether a capture has failed. No capture is tried afterwards."""

    def ready_for(self, segments: Seq[Segment]) -> bool:
        """Whether `run` can execute this step. Captures the step if its batch size is new."""
        if self.failed or len(segments) > BUCKETS[-1]:
            return False
        if any(s.stop - s.start != 1 for s in segments):
            return False
        size = _bucket(len(segments))
        if size not in self._steps:
            self._add(size)
        return size in self._steps

    def run(
        self,
        segments: Seq[Segment],
        token_ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """Logits of one token per segment, float32 [rows, vocab], a copy."""
        logits = self._steps[_bucket(len(segments))].run(segments, token_ids)
        indices = torch.from_numpy(rows).to(logits.device)
        return logits.index_select(0, indices).float()

    def _add(self, size: int) -> None:
        """Capture a step of `size` sequences; on failure set `failed` and log it."""
        try:
            self._steps[size] = _FixedStep(size, self._model, self._backend, self._capture)
        except Exception as error:  # model code may do things that a capture forbids
            self.failed = True
            _log.warning("no CUDA graph of %d sequences, steps run without graphs: %s", size, error)


class _FixedStep:
    """Step of `size` sequences whose inputs, plans and output keep their memory addresses."""

    def __init__(
        self,
        size: int,
        model: BoundModel,
        backend: FlashInferBackend,
        capture: Callable[[Run, torch.device], Run],
    ) -> None:
        self._size = size
        self._backend = backend
        device = backend.device
        # Token ids, positions and KV rows in one tensor, sent in one copy.
        self._inputs = torch.zeros(3, size, dtype=torch.int64, device=device)
        ids, positions, slots = self._inputs.unbind(0)
        max_pages = size * -(-model.max_context_len // PAGE_SIZE)
        self._attention = backend.fixed_attention(size, max_pages)
        step = backend.step_with(self._attention, slots)

        def run() -> torch.Tensor:
            with attending(step):
                return model(ids[None], positions[None], 0)

        # All rows are padding at first: the capture writes to the scratch page only.
        self._load([], np.empty(0, dtype=np.int64))
        self._replay = capture(run, device)

    def run(self, segments: Seq[Segment], token_ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Logits [size, vocab] in the model's dtype; the next run overwrites them."""
        self._load(segments, token_ids)
        self._attention.plan_all()
        return self._replay()

    def _load(self, segments: Seq[Segment], token_ids: npt.NDArray[np.int64]) -> None:
        """Fill inputs and page tables for these segments; the rest of the batch is padding."""
        store, count = self._backend.store, len(segments)
        inputs = np.zeros((3, self._size), dtype=np.int64)
        inputs[2] = store.scratch_page * PAGE_SIZE
        inputs[0, :count] = token_ids
        inputs[1, :count] = [s.past for s in segments]
        inputs[2, :count] = [store.slots(s.sequence, s.past, s.total)[0] for s in segments]
        self._inputs.copy_(torch.from_numpy(inputs))
        self._attention.begin(PageTables.of(store, segments, self._size - count))


def _bucket(num_sequences: int) -> int:
    """The batch size that this many sequences are padded to."""
    return next(bucket for bucket in BUCKETS if bucket >= num_sequences)
