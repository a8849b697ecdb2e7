"""Which replicas fit together: one model in the target tier, the same token ids in all tiers.

A target that does not fit is refused. A draft that does not is refused as well, and generations run
without it: the target judges every draft token, so a draft can cost speed, never an answer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from orchestrator.replicas.replica_stream import FetchTokenHashes
from outrider.errors import IncompatiblePair, InvalidRequest
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2
from outrider.vocabulary import Difference, Vocabulary

log = structlog.get_logger()

_ASSUME = "where they have the same vocabulary, say so: --assume-same-vocabulary"


@dataclass(frozen=True)
class DraftMatch:
    """Of the draft that connected last, as in DraftPairing (orchestrator.proto)."""

    num_differing_ids: int = 0
    is_assumed: bool = False


class Pairing:
    """The checks that links make at each connection. Lives on the event loop."""

    def __init__(self, tokenizer: Tokenizer | None, *, assume_same_vocabulary: bool) -> None:
        """`tokenizer`: the orchestrator's own. `assume_same_vocabulary`: where one has none."""
        self.draft: DraftMatch | None = None
        self._tokenizer = tokenizer
        self._assumes_same = assume_same_vocabulary
        self._served: model_pb2.ModelInfo | None = None
        self._fingerprint = ""  # of the target's tokenizer
        self._vocabulary: Vocabulary | None = None
        self._differences: dict[str, Difference] = {}  # to the target, by the draft's fingerprint

    async def token_hashes(self) -> bytes:
        """Of the target's vocabulary; empty where it has no tokenizer."""
        vocabulary = self._vocabulary
        return await asyncio.to_thread(vocabulary.to_bytes) if vocabulary is not None else b""

    async def check_target(
        self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes
    ) -> None:
        """Raises IncompatiblePair."""
        self._check_same_model(model)
        fingerprint = model.tokenizer_fingerprint
        if self._vocabulary is None or fingerprint != self._fingerprint:
            self._vocabulary = await self._check_own_tokenizer(model, token_hashes)
            self._fingerprint = fingerprint
            self._differences.clear()
        self._served = model

    def _check_same_model(self, model: model_pb2.ModelInfo) -> None:
        served = self._served
        if served is None:
            return
        if model.model_fingerprint != served.model_fingerprint:
            raise IncompatiblePair(
                f"the target is {model.name} {_short(model.model_fingerprint)} now, and was "
                f"{served.name} {_short(served.model_fingerprint)}: restart the orchestrator"
            )

    async def _check_own_tokenizer(
        self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes
    ) -> Vocabulary | None:
        """The target's vocabulary; None where it has no tokenizer."""
        own, fingerprint = self._tokenizer, model.tokenizer_fingerprint
        if own is not None and fingerprint == own.fingerprint:
            return await asyncio.to_thread(lambda: own.vocabulary)
        if not fingerprint:
            if own is not None and not self._assumes_same:
                raise IncompatiblePair(
                    f"the target {model.name} has no tokenizer to compare with this "
                    f"orchestrator's; {_ASSUME}"
                )
            return None
        theirs = await _received(model, token_hashes)
        if own is not None:
            vocabulary = await asyncio.to_thread(lambda: own.vocabulary)
            difference = vocabulary.difference(theirs)
            if difference.num_renamed or not difference.is_related:
                raise IncompatiblePair(
                    f"the target {model.name} has tokenizer {_short(fingerprint)}, this "
                    f"orchestrator {_short(own.fingerprint)}: {difference.num_ids} token ids differ"
                )
            log.warning("target_vocabulary_differs", model=model.name, num_ids=difference.num_ids)
        return theirs

    async def check_draft(self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes) -> None:
        """Raises IncompatiblePair."""
        fingerprint = model.tokenizer_fingerprint
        if not fingerprint or not self._fingerprint:
            if not self._assumes_same:
                who = "the target" if fingerprint else f"the draft {model.name}"
                raise IncompatiblePair(
                    f"draft and target cannot be compared: {who} has no tokenizer; {_ASSUME}"
                )
            self.draft = DraftMatch(is_assumed=True)
            return
        if fingerprint == self._fingerprint:
            self.draft = DraftMatch()
            return
        difference = await self._difference(model, token_hashes)
        if not difference.is_related:
            raise IncompatiblePair(
                f"draft {model.name} and target do not share a vocabulary: {difference.num_ids} "
                f"token ids differ (tokenizers {_short(fingerprint)} and "
                f"{_short(self._fingerprint)})"
            )
        log.warning("draft_vocabulary_differs", model=model.name, num_ids=difference.num_ids)
        self.draft = DraftMatch(difference.num_ids)

    async def _difference(
        self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes
    ) -> Difference:
        fingerprint = model.tokenizer_fingerprint
        if fingerprint not in self._differences:
            assert self._vocabulary is not None, "the target has a tokenizer"
            theirs = await _received(model, token_hashes)
            self._differences[fingerprint] = self._vocabulary.difference(theirs)
        return self._differences[fingerprint]


async def _received(model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes) -> Vocabulary:
    try:
        return Vocabulary.from_bytes(await token_hashes())
    except InvalidRequest as error:
        raise IncompatiblePair(f"{model.name}: {error}") from error


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"
