"""Recorder: writes committed tokens to Redis, then hands them to the transport as chunks.

Runs beside the loop of rounds, so that durability does not delay the next round. Rounds that are
committed while a write is under way are recorded and sent as one chunk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import structlog

from orchestrator.generation.conversation import Turn
from orchestrator.generation.output import Chunk
from orchestrator.generation.state import Commitment
from orchestrator.sessions import KvHandle, Lease, RoundRecord, SessionStore
from outrider.errors import LeaseLost, OutriderError, Unavailable

log = structlog.get_logger()

# Commitments that may wait for Redis and the caller before the rounds pause.
MAX_UNSEEN_COMMITMENTS = 64
# Tokens from which on a message to the client takes no further round. Of a resumed output there may
# be a hundred thousand, which take tens of milliseconds of the event loop in one message.
MAX_CHUNK_TOKENS = 4_096
# Must be well below the store's lease_ttl_s.
RENEW_INTERVAL_S = 3.0
# How long after the end of a generation Redis may come back, for what is owed to be recorded.
# Must be below the store's lease_ttl_s.
_RELEASE_RETRY_S = 8.0
_RELEASE_RETRY_INTERVAL_S = 0.3


class Recorder:
    """Of one generation. `put` by the round loop, `run` as a task of its own.

    `is_durable`: a token is in Redis before it is shown, unless Redis is away. Of a turn that is
    resumed the caller has `held_text` already, and `num_unshown` tokens that are still to come.
    No wait for Redis is longer than the store's own: without it the tokens are shown all the same.
    """

    def __init__(
        self,
        store: SessionStore,
        lease: Lease,
        turn: Turn,
        turn_json: str,
        *,
        is_durable: bool = True,
        is_begun: bool = False,
        held_text: str = "",
        num_unshown: int = 0,
    ) -> None:
        self._store = store
        self._lease = lease
        self._turn = turn
        self._turn_json = turn_json
        self.turn_recorded = is_begun
        self._has_earlier_turn = bool(lease.record.turn_json)
        self._is_durable = is_durable
        self._num_unshown = num_unshown
        self._unseen: asyncio.Queue[tuple[Commitment, RoundRecord]] = asyncio.Queue(
            MAX_UNSEEN_COMMITMENTS
        )
        self._ready: asyncio.Queue[Chunk] = asyncio.Queue(1)
        self._sending: Chunk | None = None
        self._unrecorded: RoundRecord | None = None
        # As given to `release`.
        self._end: tuple[KvHandle | None, KvHandle | None, bool, bool] = (None, None, False, False)
        self._is_away = False
        # The text that the caller has been sent.
        self.text = held_text
        # When the first chunk was ready to be sent (time.monotonic), and its number of tokens.
        self.first_chunk_at: float | None = None
        self.num_first_tokens = self.num_shown_tokens = 0

    async def put(self, commitment: Commitment, record: RoundRecord) -> None:
        """Hands over a round; waits while too many are unseen."""
        await self._unseen.put((commitment, record))

    async def drained(self) -> None:
        """Waits until all that was put is shown."""
        await self._unseen.join()

    async def run(self) -> None:
        """Until the last commitment is shown. Raises LeaseLost."""
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(self._keep_lease(), name="lease")
            await self._show_all()
            renewing.cancel()

    async def _show_all(self) -> None:
        while True:
            batch = [await self._unseen.get()]
            num_tokens = len(batch[0][0].tokens)
            while num_tokens < MAX_CHUNK_TOKENS and not self._unseen.empty():
                batch.append(self._unseen.get_nowait())
                num_tokens += len(batch[-1][0].tokens)
            for _, record in batch:
                self._unrecorded = self._unrecorded.then(record) if self._unrecorded else record
            commitments = [self._shown_of(commitment) for commitment, _ in batch]
            is_last = commitments[-1].finish is not None
            # The last chunk says whether all of it is recorded. A later turn is begun in Redis
            # before a token of it is shown: whoever resumes it then finds it there.
            is_first_of_later = self._has_earlier_turn and not self.turn_recorded
            if self._is_durable or is_last or is_first_of_later:
                await self._try_record()
            recorded = self._unrecorded is None and self._lease.is_recorded
            await self._show(_joined(commitments, recorded=recorded))
            if not self._is_durable and not is_last:
                await self._try_record()
            for _ in batch:
                self._unseen.task_done()
            if is_last:
                return

    async def _show(self, chunk: Chunk) -> None:
        if not chunk.tokens and chunk.finish is None:
            return
        if self.first_chunk_at is None:
            self.first_chunk_at = time.monotonic()
            self.num_first_tokens = len(chunk.tokens)
        self.num_shown_tokens += len(chunk.tokens)
        self.text += chunk.text
        await self._ready.put(chunk)
        await self._ready.join()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk for the client. Asking for it reports that the one before was sent."""
        if self._sending is not None:
            self._ready.task_done()
            if self._sending.finish is not None:
                raise StopAsyncIteration
        self._sending = await self._ready.get()
        return self._sending

    def _shown_of(self, commitment: Commitment) -> Commitment:
        """Without the tokens that the caller of a resumed turn holds already, and their text."""
        num = min(self._num_unshown, len(commitment.tokens))
        if num == 0:
            return commitment
        self._num_unshown -= num
        end = commitment.text_ends[num - 1]
        self.text += commitment.text[:end]
        return replace(
            commitment,
            tokens=commitment.tokens[num:],
            text=commitment.text[end:],
            text_ends=tuple(at - end for at in commitment.text_ends[num:]),
        )

    async def _keep_lease(self) -> None:
        """Long rounds and callers that read slowly must not lose the session to another call."""
        while self._lease.is_recorded:
            await asyncio.sleep(RENEW_INTERVAL_S)
            try:
                await self._store.renew(self._lease)
            except LeaseLost:
                raise
            except OutriderError as error:
                log.debug("not_renewed", session_id=self._lease.session_id, why=str(error))

    async def _try_record(self) -> None:
        """Whatever Redis answers, the generation goes on: what is owed is written later.

        Raises LeaseLost alone: the session is another's now.
        """
        was_away = self._is_away
        try:
            await self.record()
            self._is_away = False
        except LeaseLost:
            raise
        except OutriderError as error:
            self._is_away = True
            if not was_away:  # said once, not at every round
                log.warning("not_recorded", session_id=self._lease.session_id, why=str(error))

    async def record(self) -> None:
        """Writes what is owed, if anything is. Raises LeaseLost, and what else the store does.

        The turn's prompt goes with its first tokens: a turn that never came to an answer leaves
        the session as it was, so that the caller can ask again.
        """
        if self._unrecorded is None or not self._lease.is_recorded:
            self._unrecorded = None
            return
        if not self.turn_recorded:
            await self._store.begin_turn(
                self._lease,
                self._turn.token_ids[self._turn.keep_len :],
                keep_len=self._turn.keep_len,
                messages=self._turn.messages,
                turn_json=self._turn_json,
            )
            self.turn_recorded = True
        await self._store.record(self._lease, self._unrecorded)
        self._unrecorded = None

    async def release(
        self,
        target_kv: KvHandle | None,
        draft_kv: KvHandle | None,
        *,
        is_named: bool,
        is_done: bool,
    ) -> bool:
        """Ends the lease, once what is owed is written; a one-off session goes with it.

        `is_done`: all of the output was shown, so that `text` is all of the answer. The answer of
        a call that ended early is what its tokens say (`generation.resume.unanswered`).
        False: Redis is away, and it is for `go_on_releasing`.
        """
        self._end = (target_kv, draft_kv, is_named, is_done)
        return not self._lease.is_recorded or await self._release_once() is None

    async def go_on_releasing(self) -> None:
        """Tries again for some seconds. Where Redis stays away the lease lapses by itself."""
        give_up_at = time.monotonic() + _RELEASE_RETRY_S
        while (error := await self._release_once()) is not None:
            if time.monotonic() > give_up_at:
                log.error("not_released", session_id=self._lease.session_id, why=str(error))
                return
            await asyncio.sleep(_RELEASE_RETRY_INTERVAL_S)

    async def _release_once(self) -> Unavailable | None:
        try:
            await self._try_release(*self._end)
        except Unavailable as error:
            return error
        except OutriderError as error:
            log.warning("not_released", session_id=self._lease.session_id, why=str(error))
        return None

    async def _try_release(
        self, target_kv: KvHandle | None, draft_kv: KvHandle | None, is_named: bool, is_done: bool
    ) -> None:
        await self.record()
        messages = None
        if self._turn.messages and self.turn_recorded and is_done:
            messages = (*self._turn.messages, {"role": "assistant", "content": self.text})
        await self._store.release(
            self._lease,
            target_kv=target_kv,
            draft_kv=draft_kv,
            messages=messages,
            # Neither does a session stay that was made for a turn that never began.
            delete=not is_named or (self._lease.created and not self.turn_recorded),
        )


def _joined(commitments: Sequence[Commitment], *, recorded: bool) -> Chunk:
    text, text_ends = "", []
    for commitment in commitments:
        text_ends += [len(text) + end for end in commitment.text_ends]
        text += commitment.text
    tokens = tuple(token for c in commitments for token in c.tokens)
    return Chunk(
        tokens,
        text,
        tuple(text_ends),
        commitments[-1].finish,
        recorded,
        tuple(commitments),
    )
