"""Blocking client: an AsyncClient on an event loop of its own, in a thread.

It works in any thread, and inside a running event loop, which it blocks while it waits.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from outrider.client.channel import Access
from outrider.client.client import (
    DEFAULT_ENDPOINT,
    RESUME_FOR_S,
    AsyncClient,
    GenerationStream,
)
from outrider.client.info import Audit, Models, Session, SessionList
from outrider.client.request import ChatFields, Message, RequestFields
from outrider.client.results import Chunk, Generation, Output
from outrider.client.resume import Report
from outrider.errors import CallFailed
from outrider.v1 import orchestrator_pb2

Value = TypeVar("Value")


class _LoopThread:
    """Event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="outrider-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        """Runs the coroutine and waits for its result; an interrupt cancels it."""
        if not self._thread.is_alive():
            work.close()
            raise CallFailed("CANCELLED: the client is closed", was_delivered=False)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends all work; waits for the thread, unless it is the caller's own."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            if not self.is_current:
                self._thread.join()

    @property
    def is_current(self) -> bool:
        """Whether the caller is in this thread, where waiting for it would never end."""
        return threading.current_thread() is self._thread

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


class SyncStream:
    """A generation: an iterator of Chunk, for one thread at a time. As GenerationStream."""

    def __init__(self, stream: GenerationStream, loop: _LoopThread) -> None:
        self._stream = stream
        self._loop = loop

    @property
    def output(self) -> Output:
        """What was received."""
        return self._stream.output

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """The next tokens. Raises CallFailed; ResumeFailed if a broken stream was not resumed."""
        chunk = self._loop.run(_next(self._stream))
        if chunk is None:
            raise StopIteration
        return chunk

    def result(self) -> Generation:
        """The finished generation; waits for its end. Raises as iteration does."""
        return self._loop.run(self._stream.result())

    def close(self) -> None:
        """Ends the generation on the server."""
        self._loop.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Client:
    """Blocking client of one or several orchestrators, for any number of threads.

    Its methods are those of AsyncClient, which describes them.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] = DEFAULT_ENDPOINT,
        *,
        access: Access | None = None,
        resume_for_s: float = RESUME_FOR_S,
        report: Report | None = None,
    ) -> None:
        """As AsyncClient; `report` is called in the client's own thread."""
        given: dict[str, Any] = {} if report is None else {"report": report}
        self._client = AsyncClient(endpoint, access=access, resume_for_s=resume_for_s, **given)
        self._loop = _LoopThread()
        # Also at the interpreter's exit, before the thread is torn down.
        self._finalizer = weakref.finalize(self, _close, self._client, self._loop)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> SyncStream:
        """Continues a text, or token ids."""
        return self._wrap(self._client.generate(prompt, timeout_s=timeout_s, **fields))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout_s: float | None = None,
        **fields: Unpack[ChatFields],
    ) -> SyncStream:
        """The assistant's answer to chat messages."""
        return self._wrap(self._client.chat(messages, timeout_s=timeout_s, **fields))

    def resume(
        self, session_id: str, num_received: int, *, timeout_s: float | None = None
    ) -> SyncStream:
        """The rest of the session's last turn, after the `num_received` tokens of it."""
        return self._wrap(self._client.resume(session_id, num_received, timeout_s=timeout_s))

    def stream(
        self, request: orchestrator_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> SyncStream:
        """The generation of a request message of the contract."""
        return self._wrap(self._client.stream(request, timeout_s=timeout_s))

    def get_session(self, session_id: str) -> Session:
        """Tokens and statistics of a session."""
        return self._loop.run(self._client.get_session(session_id))

    def list_sessions(self) -> SessionList:
        """All sessions of the API key, sorted by name."""
        return self._loop.run(self._client.list_sessions())

    def delete_session(self, session_id: str) -> None:
        """Deletes a session and its KV cache."""
        self._loop.run(self._client.delete_session(session_id))

    def models(self) -> Models:
        """The models that the orchestrator serves."""
        return self._loop.run(self._client.models())

    def audit(self) -> Audit:
        """Results of the orchestrator's losslessness audit."""
        return self._loop.run(self._client.audit())

    def close(self) -> None:
        """Ends all generations and the client's thread."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wrap(self, stream: GenerationStream) -> SyncStream:
        return SyncStream(stream, self._loop)


async def _next(stream: GenerationStream) -> Chunk | None:
    return await anext(stream, None)


def _close(client: AsyncClient, loop: _LoopThread) -> None:
    if not loop.is_current:  # the garbage collector runs in any thread
        loop.run(client.aclose())
    loop.stop()
