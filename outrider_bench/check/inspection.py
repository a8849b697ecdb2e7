"""Inspection of a pair before any weights are loaded: tokenizers, sizes, contexts, refusals.

Refusals are those of the services: the engine's checks of a model, the orchestrator's of a pair.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from outrider.errors import ConfigError, IncompatiblePair
from outrider.tokenizer import Tokenizer

if TYPE_CHECKING:
    from outrider_bench.check.model_shape import ModelShape

# A draft of a tenth of the target's parameters or less is usual; larger ones cost what they save.
USUAL_RATIO = 10.0
_NUM_EXAMPLES = 5


class TokenizerMatch(StrEnum):
    """How two tokenizers differ, as far as a pair is concerned: in their token ids."""

    same = "same"
    added = "added tokens differ"
    related = "a few ordinary tokens differ"
    different = "different"
    unknown = "unknown: a model has no tokenizer"


@dataclass(frozen=True)
class TokenizerComparison:
    """Comparison of token ids. `num_ids`: of the ids that have a token on either side.

    `num_same_tokens`: tokens in both vocabularies, whatever their ids. `examples`: (id, target's
    token, draft's token) of the first ids that differ; None: no token.
    """

    match: TokenizerMatch
    num_ids: int = 0
    num_differing_ids: int = 0
    num_differing_ordinary_ids: int = 0
    num_same_tokens: int = 0
    examples: tuple[tuple[int, str | None, str | None], ...] = ()

    @classmethod
    def of(cls, target: Tokenizer | None, draft: Tokenizer | None) -> TokenizerComparison:
        if target is None or draft is None:
            return cls(TokenizerMatch.unknown)
        ids = target.vocabulary.differing_ids(draft.vocabulary).tolist()
        difference = target.vocabulary.difference(draft.vocabulary)
        if not ids:
            match = TokenizerMatch.same
        elif not difference.is_related:
            match = TokenizerMatch.different
        else:
            is_ordinary = difference.num_ordinary > 0
            match = TokenizerMatch.related if is_ordinary else TokenizerMatch.added
        return cls(
            match,
            num_ids=max(target.vocab_size, draft.vocab_size),
            num_differing_ids=len(ids),
            num_differing_ordinary_ids=difference.num_ordinary,
            num_same_tokens=len(target.tokens & draft.tokens),
            examples=tuple((i, target.token(i), draft.token(i)) for i in ids[:_NUM_EXAMPLES]),
        )


@dataclass(frozen=True)
class PairInspection:
    """What the files say about a pair. `draft` and `tokenizers` are None without a draft.

    `refused`: why the services would not use the pair. `notes`: what works but costs something.
    `is_reencoded`: the draft has another tokenizer, and re-encodes the target's text.
    """

    target: ModelShape
    draft: ModelShape | None
    tokenizers: TokenizerComparison | None
    parameter_ratio: float | None
    refused: tuple[str, ...]
    notes: tuple[str, ...]
    is_reencoded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON of the inspection."""
        return asdict(self)


@dataclass(frozen=True)
class InspectOptions:
    """How the models would be served; as in `outrider up`."""

    dtype: str = "auto"
    device: str = "auto"
    draft_device: str | None = None
    assume_same_vocabulary: bool = False


async def inspect_pair(target: str, draft: str | None, options: InspectOptions) -> PairInspection:
    """Inspects the files of a pair. Raises ConfigError if files are missing or cannot be read."""
    tokenizer, target_shape = await asyncio.to_thread(_read, target, options.dtype, options.device)
    if draft is None:
        refused = (f"target: {target_shape.refused}",) if target_shape.refused else ()
        return PairInspection(target_shape, None, None, None, refused, ())
    device = options.draft_device or options.device
    draft_tokenizer, draft_shape = await asyncio.to_thread(_read, draft, options.dtype, device)
    comparison = await asyncio.to_thread(TokenizerComparison.of, tokenizer, draft_tokenizer)
    shapes = {"target": target_shape, "draft": draft_shape}
    refused_list = [f"{tier}: {one.refused}" for tier, one in shapes.items() if one.refused]
    is_reencoded = comparison.match is TokenizerMatch.different
    if is_reencoded:
        pairing = await asyncio.to_thread(_reencoding_refusal, target, draft)
    else:
        pairing = await _pairing_refusal(
            (target, tokenizer), (draft, draft_tokenizer), options.assume_same_vocabulary
        )
    if pairing:
        refused_list.append(f"pair: {pairing}")
    sizes = target_shape.num_parameters, draft_shape.num_parameters
    ratio = sizes[0] / sizes[1] if all(sizes) else None
    return PairInspection(
        target_shape,
        draft_shape,
        comparison,
        ratio,
        tuple(refused_list),
        tuple(_notes(target_shape, draft_shape, comparison, ratio)),
        is_reencoded,
    )


def _read(model: str, dtype: str, device: str) -> tuple[Tokenizer | None, ModelShape]:
    from outrider.engine.options import EngineOptions
    from outrider_bench.check.model_shape import model_shape

    shape = model_shape(EngineOptions(model, dtype=dtype, device=device))
    return Tokenizer.load(model), shape


async def _pairing_refusal(
    target: tuple[str, Tokenizer | None], draft: tuple[str, Tokenizer | None], assumes_same: bool
) -> str | None:
    """Why an orchestrator would refuse the draft; None: it would not."""
    from orchestrator.replicas.pairing import Pairing
    from outrider.v1 import model_pb2

    def info(name: str, tokenizer: Tokenizer | None) -> model_pb2.ModelInfo:
        fingerprint = "" if tokenizer is None else tokenizer.fingerprint
        return model_pb2.ModelInfo(name=name, tokenizer_fingerprint=fingerprint)

    async def hashes() -> bytes:
        tokenizer = draft[1]
        assert tokenizer is not None, "fetched for a draft with a fingerprint only"
        return tokenizer.vocabulary.to_bytes()

    pairing = Pairing(target[1], assume_same_vocabulary=assumes_same)
    await pairing.check_target(info(*target), hashes)
    try:
        await pairing.check_draft(info(*draft), hashes)
    except IncompatiblePair as error:
        return str(error)
    return None


def _reencoding_refusal(target: str, draft: str) -> str | None:
    """Why the draft service cannot re-encode the target's text; None: it can."""
    from draft_service.reencoding import load_reencoders

    try:
        load_reencoders(draft, [target])
    except ConfigError as error:
        return str(error)
    return None


def _notes(
    target: ModelShape, draft: ModelShape, tokenizers: TokenizerComparison, ratio: float | None
) -> list[str]:
    notes = []
    if ratio is not None and ratio < USUAL_RATIO:
        notes.append(
            f"the target has {ratio:.1f} times the draft's parameters; {USUAL_RATIO:g} times or "
            "more is usual"
        )
    if target.architecture != draft.architecture:
        notes.append(
            f"families differ ({target.architecture}, {draft.architecture}): drafts of the "
            "target's family agree more often"
        )
    if 0 < draft.max_context_len < target.max_context_len:
        notes.append(
            f"beyond {draft.max_context_len} tokens of context generations run without draft "
            "tokens: the draft's context is shorter"
        )
    if tokenizers.match is TokenizerMatch.different:
        notes.append(
            "tokenizers differ: the draft re-encodes the text (--target-tokenizer) and drafts one "
            "chain, greedily; its acceptance is that of the real loop"
        )
    elif draft.vocab_size < target.vocab_size:
        num = target.vocab_size - draft.vocab_size
        notes.append(f"the draft never proposes the target's last {num} token ids: it has none")
    if tokenizers.match in (TokenizerMatch.added, TokenizerMatch.related):
        notes.append(
            f"{tokenizers.num_differing_ids} token ids differ: a draft token among them is rejected"
        )
    return notes
