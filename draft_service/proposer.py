"""The device thread's half of the draft: sessions, chains, one batched model step for all of them.

A step applies what has come in (so stale drafting stops within one step), advances every chain
that wants a token by one, prompts in chunks, and returns the proposals that became complete.
Knows nothing of streams, protobuf or asyncio; every method is called on the device thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from draft_service.chain import Block, Chain
from draft_service.messages import (
    Command,
    Commit,
    Ids,
    Open,
    Proposal,
    SupportWeights,
)
from outrider.engine import Append, Engine
from outrider.engine.sampler import GenerationSampler, Logits
from outrider.errors import InvalidRequest
from outrider.sampling.params import Verification
from outrider.serving.commands import Close, Failure, Forget
from outrider.serving.scheduler import GenerationKey
from outrider.serving.sessions import Live
from outrider.serving.worker import GenerationWorker


@dataclass(eq=False)
class _Generation:
    key: GenerationKey
    sampler: GenerationSampler
    verification: Verification


@dataclass(eq=False)
class _Drafting:
    live: Live[_Generation]
    chain: Chain

    @property
    def key(self) -> GenerationKey:
        return self.live.state.key

    @property
    def num_pending(self) -> int:
        """Tokens of the chain that the model has not seen; at least 1 where one is wanted."""
        return self.chain.length - self.live.sequence.length


class Proposer(GenerationWorker[Command, Proposal, _Generation, _Drafting]):
    """Owns the engine's sequences. `max_gamma` and `max_step_tokens` as in DraftConfig."""

    def __init__(
        self, engine: Engine, *, max_gamma: int, max_step_tokens: int, idle_session_ttl_s: float
    ) -> None:
        super().__init__(engine, idle_session_ttl_s)
        self._max_gamma = max_gamma
        self._max_step_tokens = max_step_tokens
        self._drafting: dict[GenerationKey, _Drafting] = {}

    @property
    def has_work(self) -> bool:
        return any(d.chain.wants_token for d in self._drafting.values())

    def _execute(self, command: Command) -> Sequence[Failure]:
        match command:
            case Open():
                return self._open(command)
            case Commit():
                self._commit(command)
            case Close():
                self._close(command.key, keep=command.keep)
            case Forget():
                self._table.forget(command.session_id)
        return ()

    def _gather(self) -> list[_Drafting]:
        return [d for d in self._drafting.values() if d.chain.wants_token]

    def _open(self, command: Open) -> Sequence[Failure]:
        self._check(command)
        info = self._engine.info
        committed_len = len(command.token_ids)
        max_len = min(command.max_len, info.max_context_len)
        if max_len < committed_len + 2:
            raise InvalidRequest("token_ids", f"{committed_len} leave no room in {max_len}")
        sampler = GenerationSampler(
            command.params,
            prompt_len=command.prompt_len,
            vocab_size=min(command.vocab_size, info.vocab_size),
            eos_token_ids=info.eos_token_ids,
            device=info.device,
        )
        generation = _Generation(command.key, sampler, command.verification)
        live, failures = self._reserve(command.session_id, command.epoch, None, max_len, generation)
        if live is None:
            return failures
        num_same = _common_prefix_len(live.token_ids[: live.sequence.length], command.token_ids)
        # The last token is run again: its logits draw the next one.
        self._engine.store.truncate(live.sequence, min(num_same, committed_len - 1))
        live.token_ids[:committed_len] = command.token_ids
        chain = Chain(live.token_ids, committed_len, command.gamma, command.lookahead)
        self._drafting[command.key] = _Drafting(live, chain)
        self._num_prefill_tokens += committed_len - live.sequence.length
        return failures

    def _check(self, command: Open) -> None:
        if command.key in self._drafting:
            raise InvalidRequest("generation_id", f"{command.key.generation_id} is open already")
        if not len(command.token_ids):
            raise InvalidRequest("token_ids", "must not be empty")
        if not 1 <= command.prompt_len <= len(command.token_ids):
            raise InvalidRequest("prompt_len", f"{command.prompt_len} is not within the context")
        if command.vocab_size < 1 or command.token_ids.max() >= command.vocab_size:
            raise InvalidRequest("token_ids", f"must be in [0, {command.vocab_size})")
        self._check_gamma(command.gamma)
        command.params.validate(command.vocab_size)

    def _check_gamma(self, gamma: int) -> None:
        if gamma > self._max_gamma:
            raise InvalidRequest("gamma", f"{gamma} exceeds {self._max_gamma}")

    def _commit(self, command: Commit) -> None:
        drafting = self._drafting.get(command.key)
        if drafting is None:
            # Lost or closed here while the commit was on its way: already said, nothing to do.
            return
        self._check_gamma(command.gamma)
        num_right = drafting.chain.commit(command.outcome, command.committed_len, command.gamma)
        sequence = drafting.live.sequence
        self._engine.store.truncate(sequence, min(sequence.length, num_right))

    def _close(self, key: GenerationKey, *, keep: bool) -> None:
        drafting = self._drafting.pop(key, None)
        if drafting is None:
            return
        sequence = drafting.live.sequence
        if keep:  # what was drafted ahead of the end is no part of the conversation
            committed_len = drafting.chain.committed_len
            self._engine.store.truncate(sequence, min(sequence.length, committed_len))
        self._table.close(drafting.live, keep=keep)

    def _advance(self, work: Sequence[_Drafting]) -> list[Proposal | Failure]:
        """One forward pass: every chain's step, then prompts within what the budget leaves.

        A quarter of the budget is the prompts' own, so that chains never starve them.
        """
        appends: list[Append] = []
        drawing: list[_Drafting] = []
        chains = [d for d in work if d.num_pending <= 2]  # a token, and one just committed
        prompts = [d for d in work if d.num_pending > 2]
        budget = max(self._max_step_tokens - len(chains), self._max_step_tokens // 4, 1)
        for drafting in (*chains, *prompts):
            sequence, start = drafting.live.sequence, drafting.live.sequence.length
            num_tokens = drafting.num_pending
            if num_tokens > 2:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
            if num_tokens == 0:
                break
            token_ids = drafting.chain.token_ids[start : start + num_tokens]
            is_last = num_tokens == drafting.num_pending
            # A padded target vocabulary may name tokens the draft has no row for: any will do.
            known = np.where(token_ids < self._engine.info.vocab_size, token_ids, 0)
            appends.append(Append(sequence, known, int(is_last)))
            if is_last:
                drawing.append(drafting)
        logits = self._engine.forward(appends)
        events = (self._try_draw(d, row) for d, row in zip(drawing, logits, strict=True))
        return [event for event in events if event is not None]

    def _try_draw(self, drafting: _Drafting, logits: Logits) -> Proposal | Failure | None:
        try:
            return self._draw(drafting, logits)
        except Exception as error:  # this chain's own; the others go on
            return self._failed(drafting.key, error)

    def _draw(self, drafting: _Drafting, logits: Logits) -> Proposal | None:
        chain, generation = drafting.chain, drafting.live.state
        position = chain.length
        if chain.next_is_guess:
            token_id = generation.sampler.guess(logits, chain.token_ids, position)
            chain.add(token_id, None)
            return None
        token_id, support = generation.sampler.draft(
            logits,
            chain.token_ids,
            position,
            base_len=chain.current_block.base_len,
            verification=generation.verification,
        )
        block = chain.add(token_id, SupportWeights(*support) if support else None)
        return _proposal(generation.key, chain, block) if block else None


def _proposal(key: GenerationKey, chain: Chain, block: Block) -> Proposal:
    return Proposal(
        key=key,
        id=block.id,
        outcome=block.outcome,
        base_len=block.base_len,
        token_ids=chain.token_ids[block.base_len : block.end].tolist(),
        supports=list(block.supports) if block.supports else None,
    )


def _common_prefix_len(held: Ids, wanted: Ids) -> int:
    size = min(len(held), len(wanted))
    differing = np.flatnonzero(held[:size] != wanted[:size])
    return int(differing[0]) if len(differing) else size
