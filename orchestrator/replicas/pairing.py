"""Pairing: checks that all targets serve one model, and that all tiers use the same token ids.

Replicas that do not fit are refused. Without a draft that fits, generations run without draft
tokens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from orchestrator.replicas.replica_stream import FetchTokenHashes
from outrider.errors import IncompatiblePair, InvalidRequest
from outrider.runtime.protobuf import pack_ranges
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2
from outrider.vocabulary import Difference, Vocabulary

log = structlog.get_logger()

_ASSUME = "if they have the same vocabulary, set --assume-same-vocabulary"


@dataclass(frozen=True)
class DraftMatch:
    """Match of the draft that connected last. Mirrors orchestrator.proto's DraftPairing."""

    num_differing_ids: int = 0
    is_assumed: bool = False
    is_reencoded: bool = False


@dataclass(frozen=True)
class PairedTarget:
    """Properties of the target that a draft replica needs. Mirrors draft.proto's DraftTarget."""

    name: str
    model_fingerprint: str
    unshared_ids: bytes = b""
    tokenizer_fingerprint: str = ""


class Pairing:
    """Checks that links make at each connection. Runs on the event loop."""

    def __init__(self, tokenizer: Tokenizer | None, *, assume_same_vocabulary: bool) -> None:
        """`tokenizer`: the orchestrator's own. `assume_same_vocabulary`: if a tier has none."""
        self.draft: DraftMatch | None = None
        self._tokenizer = tokenizer
        self._assume_same = assume_same_vocabulary
        self._served: model_pb2.ModelInfo | None = None
        self._fingerprint = ""  # the target tokenizer's
        self._vocabulary: Vocabulary | None = None
        # By the draft tokenizer's fingerprint.
        self._differences: dict[str, Difference] = {}
        self._unshared_ids: dict[str, bytes] = {}

    async def token_hashes(self) -> bytes:
        """Token hashes of the target's vocabulary; empty if the target has no tokenizer."""
        vocabulary = self._vocabulary
        return await asyncio.to_thread(vocabulary.to_bytes) if vocabulary is not None else b""

    async def check_target(
        self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes
    ) -> None:
        """Raises IncompatiblePair if the target does not fit the other targets or the tokenizer."""
        self._check_same_model(model)
        fingerprint = model.tokenizer_fingerprint
        if self._vocabulary is None or fingerprint != self._fingerprint:
            self._vocabulary = await self._check_own_tokenizer(model, token_hashes)
            self._fingerprint = fingerprint
            self._differences.clear()
            self._unshared_ids.clear()
        self._served = model

    def _check_same_model(self, model: model_pb2.ModelInfo) -> None:
        served = self._served
        if served is None:
            return
        if model.model_fingerprint != served.model_fingerprint:
            raise IncompatiblePair(
                f"the target now serves {model.name} {_short(model.model_fingerprint)}, before it "
                f"was {served.name} {_short(served.model_fingerprint)}: restart the orchestrator"
            )

    async def _check_own_tokenizer(
        self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes
    ) -> Vocabulary | None:
        """The target's vocabulary; None if it has no tokenizer."""
        own, fingerprint = self._tokenizer, model.tokenizer_fingerprint
        if own is not None and fingerprint == own.fingerprint:
            return await asyncio.to_thread(lambda: own.vocabulary)
        if not fingerprint:
            if own is not None and not self._assume_same:
                raise IncompatiblePair(
                    f"the target {model.name} has no tokenizer to compare with this "
                    f"orchestrator's; {_ASSUME}"
                )
            return None
        vocabulary = await _fetched(model, token_hashes)
        if own is not None:
            own_vocabulary = await asyncio.to_thread(lambda: own.vocabulary)
            difference = own_vocabulary.difference(vocabulary)
            if difference.num_renamed or not difference.is_related:
                raise IncompatiblePair(
                    f"the target {model.name} has tokenizer {_short(fingerprint)}, this "
                    f"orchestrator {_short(own.fingerprint)}: {difference.num_ids} token ids differ"
                )
            log.warning("target_vocabulary_differs", model=model.name, num_ids=difference.num_ids)
        return vocabulary

    async def check_draft(self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes) -> None:
        """Raises IncompatiblePair if the draft's token ids are not the target's.

        Other ids are accepted from a draft that re-encodes the target's text.
        """
        fingerprint = model.tokenizer_fingerprint
        if not fingerprint or not self._fingerprint:
            if not self._assume_same:
                missing = "the target" if fingerprint else f"the draft {model.name}"
                raise IncompatiblePair(
                    f"draft and target cannot be compared: {missing} has no tokenizer; {_ASSUME}"
                )
            self.draft = DraftMatch(is_assumed=True)
            return
        if fingerprint == self._fingerprint:
            self.draft = DraftMatch()
            return
        difference = await self._difference(model, token_hashes)
        if not difference.is_related:
            if self._fingerprint not in model.target_tokenizer_fingerprints:
                raise IncompatiblePair(
                    f"draft {model.name} and target do not share a vocabulary: "
                    f"{difference.num_ids} token ids differ (tokenizers {_short(fingerprint)} and "
                    f"{_short(self._fingerprint)}); to re-encode the text between them, set "
                    "--target-tokenizer of the draft service to the target's tokenizer"
                )
            log.info("draft_reencodes", model=model.name, num_ids=difference.num_ids)
            self.draft = DraftMatch(difference.num_ids, is_reencoded=True)
            return
        log.warning("draft_vocabulary_differs", model=model.name, num_ids=difference.num_ids)
        self.draft = DraftMatch(difference.num_ids)

    def paired_target(self, model: model_pb2.ModelInfo) -> PairedTarget | None:
        """The target, for a draft that `check_draft` accepted; None before a target connects."""
        served = self._served
        if served is None:
            return None
        fingerprint = model.tokenizer_fingerprint
        difference = self._differences.get(fingerprint)
        if difference is not None and not difference.is_related:
            return PairedTarget(
                served.name, served.model_fingerprint, tokenizer_fingerprint=self._fingerprint
            )
        unshared = self._unshared_ids.get(fingerprint, b"")
        return PairedTarget(served.name, served.model_fingerprint, unshared)

    async def _difference(
        self, model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes
    ) -> Difference:
        fingerprint = model.tokenizer_fingerprint
        if fingerprint not in self._differences:
            assert self._vocabulary is not None, "the target has a tokenizer"
            vocabulary = await _fetched(model, token_hashes)
            self._differences[fingerprint] = self._vocabulary.difference(vocabulary)
            size = self._served.vocab_size if self._served is not None else 0
            ids = self._vocabulary.unshared_ids(vocabulary, size)
            self._unshared_ids[fingerprint] = pack_ranges(ids)
        return self._differences[fingerprint]


async def _fetched(model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes) -> Vocabulary:
    try:
        return Vocabulary.from_bytes(await token_hashes())
    except InvalidRequest as error:
        raise IncompatiblePair(f"{model.name}: {error}") from error


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"
