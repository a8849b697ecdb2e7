"""Recorder: writes committed tokens to Redis, then passes them to the transport as chunks.

It runs concurrently with the loop of rounds, so that durability does not delay the next round.
Rounds committed during a write are recorded and sent together as one chunk.
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

# Commitments that may wait for Redis and the client before the rounds pause.
MAX_PENDING_COMMITMENTS = 64
# A chunk with this many tokens takes no further round. A resumed output may have a hundred thousand
# tokens: in one message they would block the event loop for tens of milliseconds.
MAX_CHUNK_TOKENS = 4_096
# Must be well below the store's lease_ttl_s.
RENEW_INTERVAL_S = 3.0
# How long after the end of a generation pending writes are retried while Redis is unreachable.
# Must be below the store's lease_ttl_s.
_RELEASE_RETRY_S = 8.0
_RELEASE_RETRY_INTERVAL_S = 0.3


class Recorder:
    """Recorder of one generation. The loop of rounds calls `put`; `run` is a task of its own.

    `is_durable`: a token is in Redis before it is sent, unless Redis is unreachable. A resumed turn
    (`is_resumed`) starts with `received_text`, which the client has. The client may also have
    `num_to_skip` tokens that were not recorded: they are generated again and not sent.

    While Redis is unreachable tokens are still sent: the store bounds each wait for it.
    """

    def __init__(
        self,
        store: SessionStore,
        lease: Lease,
        turn: Turn,
        turn_json: str,
        *,
        is_durable: bool = True,
        is_resumed: bool = False,
        received_text: str = "",
        num_to_skip: int = 0,
    ) -> None:
        self._store = store
        self._lease = lease
        self._turn = turn
        self._turn_json = turn_json
        self._turn_recorded = is_resumed
        self._has_earlier_turn = bool(lease.record.turn_json)
        self._is_durable = is_durable
        self._num_to_skip = num_to_skip
        self._pending: asyncio.Queue[tuple[Commitment, RoundRecord]] = asyncio.Queue(
            MAX_PENDING_COMMITMENTS
        )
        self._ready: asyncio.Queue[Chunk] = asyncio.Queue(1)
        self._sending: Chunk | None = None
        self._unrecorded: RoundRecord | None = None
        # Arguments of `release`.
        self._end: tuple[KvHandle | None, KvHandle | None, bool, bool] = (None, None, False, False)
        self._is_away = False
        # Parts of the text that the client has received.
        self._texts = [received_text]
        self._included_stop = ""
        # When the first chunk was ready to be sent (time.monotonic), and its number of tokens.
        self.first_chunk_at: float | None = None
        self.num_first_tokens = self.num_sent_tokens = 0

    async def put(self, commitment: Commitment, record: RoundRecord) -> None:
        """Adds a round; waits while too many rounds are pending."""
        await self._pending.put((commitment, record))

    async def drained(self) -> None:
        """Waits until all rounds that were put are sent."""
        await self._pending.join()

    async def run(self) -> None:
        """Records and sends rounds until the last one is sent. Raises LeaseLost."""
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(self._keep_lease(), name="lease")
            await self._send_all()
            renewing.cancel()

    async def _send_all(self) -> None:
        while True:
            batch = [await self._pending.get()]
            num_tokens = len(batch[0][0].tokens)
            while num_tokens < MAX_CHUNK_TOKENS and not self._pending.empty():
                batch.append(self._pending.get_nowait())
                num_tokens += len(batch[-1][0].tokens)
            for _, record in batch:
                self._unrecorded = self._unrecorded.then(record) if self._unrecorded else record
            commitments = [self._without_received(commitment) for commitment, _ in batch]
            is_last = commitments[-1].finish is not None
            # The last chunk reports whether all of the output is recorded. A turn after the
            # session's first begins in Redis before a token of it is sent, so that a resumption
            # finds it there.
            is_first_of_later = self._has_earlier_turn and not self._turn_recorded
            if self._is_durable or is_last or is_first_of_later:
                await self._try_record()
            recorded = self._unrecorded is None and self._lease.is_recorded
            await self._send(_joined(commitments, recorded=recorded))
            if not self._is_durable and not is_last:
                await self._try_record()
            for _ in batch:
                self._pending.task_done()
            if is_last:
                return

    async def _send(self, chunk: Chunk) -> None:
        if not chunk.tokens and chunk.finish is None:
            return
        if self.first_chunk_at is None:
            self.first_chunk_at = time.monotonic()
            self.num_first_tokens = len(chunk.tokens)
        self.num_sent_tokens += len(chunk.tokens)
        self._texts.append(chunk.text)
        if chunk.finish is not None:
            self._included_stop = chunk.finish.included_stop
        await self._ready.put(chunk)
        await self._ready.join()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """Returns the next chunk. The call also reports that the previous chunk was sent."""
        if self._sending is not None:
            self._ready.task_done()
            if self._sending.finish is not None:
                raise StopAsyncIteration
        self._sending = await self._ready.get()
        return self._sending

    def _without_received(self, commitment: Commitment) -> Commitment:
        """Removes tokens, and their text, that the client of a resumed turn has already."""
        num = min(self._num_to_skip, len(commitment.tokens))
        if num == 0:
            return commitment
        self._num_to_skip -= num
        end = commitment.text_ends[num - 1]
        self._texts.append(commitment.text[:end])
        return replace(
            commitment,
            tokens=commitment.tokens[num:],
            text=commitment.text[end:],
            text_ends=tuple(at - end for at in commitment.text_ends[num:]),
        )

    async def _keep_lease(self) -> None:
        """Renews the lease: long rounds and slow clients must not lose the session."""
        while self._lease.is_recorded:
            await asyncio.sleep(RENEW_INTERVAL_S)
            try:
                await self._store.renew(self._lease)
            except LeaseLost:
                raise
            except OutriderError as error:
                log.debug("not_renewed", session_id=self._lease.session_id, why=str(error))

    async def _try_record(self) -> None:
        """Records pending rounds. If that fails, the generation continues and they are kept.

        Raises only LeaseLost: another request owns the session now.
        """
        was_away = self._is_away
        try:
            await self._record()
            self._is_away = False
        except LeaseLost:
            raise
        except OutriderError as error:
            self._is_away = True
            if not was_away:  # logged once, not at every round
                log.warning("not_recorded", session_id=self._lease.session_id, why=str(error))

    async def _record(self) -> None:
        """Writes the pending rounds, if any. Raises LeaseLost and the store's other errors.

        The prompt is written with the first tokens. A turn without tokens leaves the session as it
        was, so that the client can send the request again.
        """
        if self._unrecorded is None or not self._lease.is_recorded:
            self._unrecorded = None
            return
        if not self._turn_recorded:
            await self._store.begin_turn(
                self._lease,
                self._turn.token_ids[self._turn.keep_len :],
                keep_len=self._turn.keep_len,
                messages=self._turn.messages,
                turn_json=self._turn_json,
            )
            self._turn_recorded = True
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
        """Writes pending rounds, then releases the lease. Deletes the session if not `is_named`.

        `is_done`: all of the output was sent, so that the answer can be added to the chat. The next
        turn restores an answer that ended early (`generation.resume.interrupted_turn`). Returns
        False if Redis is unreachable: call `retry_release` then.
        """
        self._end = (target_kv, draft_kv, is_named, is_done)
        return not self._lease.is_recorded or await self._release_once() is None

    async def retry_release(self) -> None:
        """Retries `release` for some seconds. If Redis stays unreachable, the lease expires."""
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
        await self._record()
        messages = None
        if self._turn.is_chat and self._turn_recorded and is_done:
            # The template writes the end of an answer itself.
            text = "".join(self._texts).removesuffix(self._included_stop)
            messages = (*self._turn.messages, self._turn.answer(text))
        await self._store.release(
            self._lease,
            target_kv=target_kv,
            draft_kv=draft_kv,
            messages=messages,
            # A session created for a turn that did not begin is deleted, too.
            delete=not is_named or (self._lease.created and not self._turn_recorded),
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
        prompt_logprobs=commitments[0].prompt_logprobs,
    )
