"""Opening of a generation in the draft's own tokens: context, room and sampler.

With the target's tokenizer these are the request's own. With another one the context is encoded
again, and drafting is greedy: sampling parameters in target tokens mean nothing to the draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import structlog

from draft_service.messages import Ids, OpenDraft
from draft_service.reencoding import Reencoder
from draft_service.tree.targets import ServedTarget
from draft_service.tree.text_tree import TextContext
from outrider.engine import Sampler, ServedEngine
from outrider.errors import InvalidRequest
from outrider.grammar import Grammar, GrammarState
from outrider.sampling.params import SamplingParams

log = structlog.get_logger()

# Room for draft tokens, for each target token of a generation whose text is re-encoded.
_MAX_LEN_RATIO = 4
_GREEDY = SamplingParams(temperature=0.0, max_tokens=1, seed=0)


@dataclass(frozen=True)
class Opening:
    """`token_ids`: the context in draft tokens. `text`: how it was encoded; None: as it came.

    `grammar`: position in the format of the output; None: draft tokens are not masked.
    """

    token_ids: Ids
    max_len: int
    sampler: Sampler
    text: TextContext | None
    grammar: GrammarState | None = None


class Openings:
    """Makes the openings of one replica. `reencoders`: by the target tokenizer's fingerprint."""

    def __init__(
        self, engine: ServedEngine, reencoders: Mapping[str, Reencoder], max_gamma: int
    ) -> None:
        self._engine = engine
        self._reencoders = reencoders
        self._max_gamma = max_gamma

    def opening(self, command: OpenDraft, target: ServedTarget) -> Opening:
        """Raises InvalidRequest if the command is out of range or leaves no room for drafts."""
        command.check(self._max_gamma)
        fingerprint = command.target.tokenizer_fingerprint
        if not fingerprint:
            self._check_room(command.token_ids, max_len := self._max_len(command.max_len))
            vocab_size = min(command.vocab_size, self._engine.info.vocab_size)
            sampler = self._engine.sampler(
                command.params, command.prompt_len, vocab_size, target.forbidden_ids(vocab_size)
            )
            return Opening(command.token_ids, max_len, sampler, None, self._grammar(command))
        if (reencoder := self._reencoders.get(fingerprint)) is None:
            raise InvalidRequest(
                "target.tokenizer_fingerprint", f"{fingerprint[:12]} is none of --target-tokenizer"
            )
        text = TextContext(reencoder, *reencoder.draft_context(command.token_ids.tolist()))
        token_ids = np.array(text.token_ids)
        self._check_room(token_ids, max_len := self._max_len(_MAX_LEN_RATIO * command.max_len))
        vocab_size = min(reencoder.vocab_size, self._engine.info.vocab_size)
        sampler = self._engine.sampler(_GREEDY, len(token_ids), vocab_size)
        return Opening(token_ids, max_len, sampler, text)

    def _grammar(self, command: OpenDraft) -> GrammarState | None:
        """None, too, if the format cannot be compiled here: then the target alone applies it."""
        if isinstance(command.grammar, Grammar):
            return GrammarState(command.grammar, self._engine.info.eos_token_ids)
        if command.grammar is not None:
            log.warning("unmasked_drafts", session_id=command.session_id, why=str(command.grammar))
        return None

    def _max_len(self, max_len: int) -> int:
        return min(max_len, self._engine.info.max_context_len)

    def _check_room(self, token_ids: Ids, max_len: int) -> None:
        if max_len < len(token_ids) + 2:
            raise InvalidRequest(
                "token_ids", f"{len(token_ids)} leave no room for drafts; at most {max_len - 2}"
            )
