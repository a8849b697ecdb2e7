"""Gate before the scheduler: holds a generation's commands back while its grammar is compiled.

Neither the event loop nor the device thread waits for a compilation, and other generations of the
stream go on. For use on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Generic, TypeVar

from outrider.errors import InvalidRequest, OutriderError
from outrider.grammar import Grammar, GrammarCompiler
from outrider.model_server.scheduler import GenerationKey, Keyed, Scheduler
from outrider.sampling.structured_outputs import StructuredOutputs

Command = TypeVar("Command", bound=Keyed)
# What an open carries: a grammar, why there is none, or None for free text.
OpenGrammar = Grammar | OutriderError | None


class GrammarGate(Generic[Command]):
    """Gate of one stream. `compiler` None: the model has no tokenizer of which grammars are made.

    Opens have `params` and `grammar`; the gate sets `grammar`.
    """

    def __init__(
        self, compiler: GrammarCompiler | None, scheduler: Scheduler[Command, Any]
    ) -> None:
        self._compiler = compiler
        self._scheduler = scheduler
        # Commands of generations whose grammar is being compiled, the open first.
        self._held: dict[GenerationKey, list[Command]] = {}

    def passed(self, commands: Sequence[Command]) -> list[Command]:
        """The commands that may be queued now, in order; the others follow by themselves."""
        if self._held:
            return [done for command in commands for done in self._one(command)]
        if not any(map(_structured, commands)):  # the usual case
            return list(commands)
        return [done for command in commands for done in self._one(command)]

    def close(self) -> None:
        """The stream has ended: commands held back are dropped; nothing was opened by them."""
        self._held.clear()

    def _one(self, command: Command) -> list[Command]:
        if (held := self._held.get(command.key)) is not None:
            held.append(command)
            return []
        if (structured := _structured(command)) is None:
            return [command]
        try:
            structured.validate()
        except InvalidRequest as error:
            return [_with(command, error)]
        if self._compiler is None:
            why = "the model has no tokenizer that maps tokens to bytes and has its EOS token"
            return [_with(command, InvalidRequest(structured.field, why))]
        compiling = self._compiler.submit(structured)
        if compiling.done():
            return [_with(command, _outcome(compiling))]
        self._held[command.key] = [command]
        loop = asyncio.get_running_loop()
        compiling.add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._release, command.key, _outcome(done))
        )
        return []

    def _release(self, key: GenerationKey, grammar: OpenGrammar) -> None:
        opening, *others = self._held.pop(key, [None])
        if opening is not None:  # otherwise the stream has ended
            self._scheduler.submit_held([_with(opening, grammar), *others])


def _structured(command: Any) -> StructuredOutputs | None:
    params = getattr(command, "params", None)
    return None if params is None else params.structured_outputs


def _outcome(compiling: Future[Grammar]) -> OpenGrammar:
    error = compiling.exception()
    if error is None:
        return compiling.result()
    return error if isinstance(error, OutriderError) else InvalidRequest("sampling", str(error))


def _with(command: Any, grammar: OpenGrammar) -> Any:
    return replace(command, grammar=grammar)
