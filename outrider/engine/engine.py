"""Engine: appends tokens to many sequences in one forward pass and returns logits.

Prefill, decoding, verification and drafting are the same call with different lengths. Loading is in
`loading/load.py`, sampling in `sampling/sampler.py`, sessions in `outrider/model_server`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from outrider.engine.attention.cuda_graphs import GraphedSteps
from outrider.engine.attention.interface import attending
from outrider.engine.attention.segments import Backend, Segment
from outrider.engine.interface import (
    Append,
    BlockScores,
    Ids,
    PromptRequest,
    PromptScores,
    SampledToken,
    SampleRequest,
    ScoreRequest,
)
from outrider.engine.kv.store import KVStore
from outrider.engine.loading.loaded_model import BoundModel
from outrider.engine.options import EngineInfo
from outrider.engine.parallel.operations import OperationLog
from outrider.engine.sampling.prompt_logprobs import score_prompts
from outrider.engine.sampling.sampler import GenerationSampler, sample_all, score_all
from outrider.engine.step_memory import out_of_memory
from outrider.sampling.params import SamplingParams

Result = TypeVar("Result")


class Engine:
    """A loaded model, its KV store and its attention backend. Call it on the device thread only."""

    def __init__(
        self,
        model: BoundModel,
        store: KVStore,
        info: EngineInfo,
        backend: Backend,
        graphs: GraphedSteps | None = None,
        log: OperationLog | None = None,
    ) -> None:
        """`log`: with tensor parallelism, what the other ranks replay."""
        self._model = model
        self._backend = backend
        self._graphs = graphs
        self._log = log
        self.store = store
        self.info = info

    def forward(self, appends: Seq[Append]) -> torch.Tensor:
        """Append to all sequences in one pass; return logits of their last `num_logits` tokens.

        Returns float32 [sum of num_logits, vocab_size], rows in the order of `appends`, on the
        device of the output layer. Lengths change only after success, so a failed call can be
        repeated. Call it on the device thread only.

        Raises ValueError for an invalid append: no tokens, a sequence that was freed or is listed
        twice, more tokens than the reservation or the model's context allows, or an unknown token
        id; StepOutOfMemory if the pass did not fit into the device's memory, which is free again.
        """
        tokens = [np.asarray(append.token_ids, dtype=np.int64) for append in appends]
        segments = self._plan(appends, tokens)
        if not segments:
            return torch.empty(0, self._model.vocab_size)
        rows = [
            np.arange(segment.stop - append.num_logits, segment.stop)
            for segment, append in zip(segments, appends, strict=True)
        ]
        run = partial(self._run, segments, np.concatenate(tokens), np.concatenate(rows))
        logits = _within_memory(run, segments[-1].stop, sum(map(len, rows)))
        for segment in segments:
            segment.sequence.length = segment.total
        return logits

    def _plan(self, appends: Seq[Append], tokens: list[npt.NDArray[np.int64]]) -> list[Segment]:
        """Validate all appends before anything changes; assign each sequence its packed rows."""
        segments: list[Segment] = []
        start = 0
        for append, ids in zip(appends, tokens, strict=True):
            sequence, count = append.sequence, ids.size
            self._check(append, ids)
            segments.append(Segment(sequence, start, start + count, sequence.length))
            start += count
        if len({id(segment.sequence) for segment in segments}) != len(segments):
            raise ValueError("a sequence is listed twice in one forward")
        return segments

    def _check(self, append: Append, ids: npt.NDArray[np.int64]) -> None:
        sequence, model = append.sequence, self._model
        if not self.store.owns(sequence):
            raise ValueError(f"{sequence} is not open in this engine's store")
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"token_ids must be a non-empty list, not of shape {ids.shape}")
        if not 0 <= append.num_logits <= ids.size:
            raise ValueError(f"num_logits is {append.num_logits} for {ids.size} tokens")
        room = min(sequence.max_len, model.max_context_len) - sequence.length
        if ids.size > room:
            raise ValueError(
                f"{ids.size} tokens do not fit {sequence} "
                f"(the model's context is {model.max_context_len})"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= model.num_embeddings:
            raise ValueError(f"a token id is outside [0, {model.num_embeddings})")

    def _run(
        self,
        segments: list[Segment],
        token_ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        with torch.inference_mode():
            if self._graphs is not None and self._graphs.ready_for(segments):
                return self._graphs.run(segments, token_ids, rows)
            return self._run_packed(segments, token_ids, rows)

    def replay(
        self,
        segments: list[Segment],
        token_ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> None:
        """Run a pass of rank 0 on another rank, which has its own part of weights and KV."""
        self._run(segments, token_ids, rows)

    def _run_packed(
        self,
        segments: list[Segment],
        token_ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        positions = np.concatenate([np.arange(s.past, s.total) for s in segments])
        device = self._model.device
        step = self._backend.step(segments)  # it may move sequences to other pages
        sent: AbstractContextManager[None] = nullcontext()
        if self._log is not None:
            sent = self._log.step(segments, token_ids, rows)
        with sent, attending(step):
            logits = self._model(
                torch.from_numpy(token_ids)[None].to(device),
                torch.from_numpy(positions)[None].to(device),
                # A CPU index can select from hidden states on any device; they are on the last one.
                torch.from_numpy(rows),
            )
        return logits.float()

    def sampler(
        self,
        params: SamplingParams,
        prompt_len: int,
        vocab_size: int,
        forbidden_ids: Ids | None = None,
    ) -> GenerationSampler:
        """A generation's sampling state.

        Tokens at or beyond `vocab_size` and `forbidden_ids` (int64) are never sampled. Generations
        with the same array of `forbidden_ids` are sampled together.
        """
        return GenerationSampler(
            params,
            prompt_len=prompt_len,
            vocab_size=min(vocab_size, self.info.vocab_size),
            eos_token_ids=self.info.eos_token_ids,
            device=self.info.device,
            forbidden_ids=forbidden_ids,
        )

    def sample(
        self, requests: Seq[SampleRequest], logits: torch.Tensor
    ) -> list[SampledToken | Exception]:
        """Sample one token per row of logits, as `ServedEngine.sample`."""
        return _within_memory(partial(sample_all, requests, logits), 0, len(logits))

    def score(
        self, requests: Seq[ScoreRequest], logits: torch.Tensor
    ) -> list[BlockScores | Exception]:
        """Score one block per request, as `ServedEngine.score`."""
        return _within_memory(partial(score_all, requests, logits), 0, len(logits))

    def score_prompts(
        self, requests: Seq[PromptRequest], logits: torch.Tensor
    ) -> list[PromptScores | Exception]:
        """Log-probabilities of prompt tokens, as `ServedEngine.score_prompts`."""
        return _within_memory(partial(score_prompts, requests, logits), 0, len(logits))


def _within_memory(compute: Callable[[], Result], num_tokens: int, num_rows: int) -> Result:
    """The result of `compute`. Raises StepOutOfMemory if an allocator had no memory for it."""
    try:
        return compute()
    except Exception as error:
        full = out_of_memory(error, num_tokens, num_rows)
        if full is None:
            raise
    raise full  # here: not chained to the first error, whose frames hold tensors
