"""State of a generation at the target, and its part of a forward pass. Device thread only."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from outrider.engine import Append, Sampler, ScoreRequest, ServedEngine
from outrider.engine.interface import BlockScores, Ids, Logits, PromptRequest, PromptScores
from outrider.errors import InvalidRequest
from outrider.grammar import Grammar, GrammarState
from outrider.model_server.grammar_masks import MaskRequest, Masks, MaskThread
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import LiveGeneration
from target_service.messages import DraftSearch, OpenTarget, Verify

# Rows of logits of one prompt in a pass: 128 MiB with a vocabulary of 131,072.
_MAX_PROMPT_LOGITS = 256


@dataclass(eq=False)
class OpenGeneration:
    """The target's state of a generation; fields from `is_begun` on: of the waiting request."""

    key: GenerationKey
    sampler: Sampler
    prompt_len: int
    preempts: bool = False
    committed_len: int = 0
    waiting: Verify | None = None
    # Whether KV was reserved for its first pass.
    is_begun: bool = False
    # Tokens found in the prefix cache.
    num_reused: int = 0
    step_s: float = 0.0
    # Set if draft tokens give NaN or infinite logits, or a position without allowed tokens.
    search: DraftSearch | None = None
    # Log-probabilities of the prompt's first tokens, if the request asks for them.
    prompt_scores: list[PromptScores] = field(default_factory=list)
    # Position in the grammar of the output's format; None: free text.
    grammar: GrammarState | None = None

    @property
    def scored_prompt(self) -> PromptScores | None:
        """Log-probabilities of the whole prompt; None: not requested."""
        if self.waiting is None or not self.waiting.with_prompt_logprobs:
            return None
        return PromptScores.joined(self.prompt_scores, self.sampler.params.prompt_logprobs or 0)

    @property
    def num_left_out(self) -> int:
        search = self.search
        return len(search.request.draft_token_ids) - search.num_good if search is not None else 0


@dataclass(frozen=True)
class PlannedRequest:
    """The part of a verify request that is in the next pass; `is_last`: this part completes it."""

    live: LiveGeneration[OpenGeneration]
    request: Verify
    append: Append
    is_last: bool
    scores_prompt: bool = False

    @property
    def key(self) -> GenerationKey:
        return self.request.key

    def ask(self, forbidden: Ids | None) -> ScoreRequest:
        """`forbidden`: masks of the format, one row for each of the request's logits."""
        return ScoreRequest(
            self.live.state.sampler,
            self.live.token_ids,
            self.request.committed_len,
            self.append.num_logits,
            self.request.supports,
            forbidden,
        )

    @property
    def prompt_request(self) -> PromptRequest:
        """Its logits are those before the prompt's tokens that follow the appended ones."""
        state, num = self.live.state, self.append.num_logits
        start = self.live.sequence.length - num
        next_ids = self.live.token_ids[start + 1 : start + num + 1]
        return PromptRequest(next_ids, state.sampler.params.prompt_logprobs or 0)

    def mask_request(self, grammar: GrammarState) -> MaskRequest:
        prompt_len, committed_len = self.live.state.prompt_len, self.request.committed_len
        output_ids = self.live.token_ids[prompt_len : self.request.num_tokens]
        return MaskRequest(grammar, output_ids, committed_len - prompt_len, self.append.num_logits)


def waiting_request(live: LiveGeneration[OpenGeneration]) -> Verify:
    request = live.state.waiting
    assert request is not None, "a waiting generation has a request"
    return request


def num_tokens_left(live: LiveGeneration[OpenGeneration]) -> int:
    return waiting_request(live).num_tokens - live.sequence.length


def num_rows_of(live: LiveGeneration[OpenGeneration]) -> int:
    """Rows of logits of its block."""
    return 1 + len(waiting_request(live).draft_token_ids)


def planned_request(
    live: LiveGeneration[OpenGeneration], max_tokens: int, max_rows: int
) -> PlannedRequest:
    """The request's next tokens, at most `max_tokens`; all of its block's logits in one pass.

    `max_rows`: most rows of logits of a part of a prompt.
    """
    request, start, num_left = waiting_request(live), live.sequence.length, num_tokens_left(live)
    num_unscored = live.state.prompt_len - 1 - start if request.with_prompt_logprobs else 0
    if num_unscored > 0:
        num = min(max_tokens, num_unscored, max_rows, _MAX_PROMPT_LOGITS)
        append = Append(live.sequence, live.token_ids[start : start + num], num)
        return PlannedRequest(live, request, append, is_last=False, scores_prompt=True)
    num_logits = num_rows_of(live)
    is_last = num_left <= max_tokens
    num_tokens = num_left if is_last else min(max_tokens, num_left - num_logits)
    token_ids = live.token_ids[start : start + num_tokens]
    append = Append(live.sequence, token_ids, num_logits if is_last else 0)
    return PlannedRequest(live, request, append, is_last)


def score_prompts(
    work: Sequence[PlannedRequest], engine: ServedEngine, logits: Logits
) -> list[tuple[PlannedRequest, Exception]]:
    """Log-probabilities of the prompts in a pass, kept in their state. Returns those that fail."""
    scored = [planned for planned in work if planned.scores_prompt]
    if not scored:
        return []
    failed: list[tuple[PlannedRequest, Exception]] = []
    replies = engine.score_prompts([planned.prompt_request for planned in scored], logits)
    for planned, reply in zip(scored, replies, strict=True):
        if isinstance(reply, Exception):
            failed.append((planned, reply))
        else:
            planned.live.state.prompt_scores.append(reply)
    return failed


class DeadEnd(Exception):
    """The format allows no token after `num_live` - 1 draft tokens, which it allows themselves."""

    def __init__(self, num_live: int) -> None:
        super().__init__(f"no token is allowed after {num_live} draft tokens")
        self.num_live = num_live


class Scoring:
    """Scores of one pass's complete requests; their masks are computed while the pass runs.

    Create it before the pass.
    """

    def __init__(self, complete: Sequence[PlannedRequest], masks: MaskThread) -> None:
        self._complete = complete
        grammars = [planned.live.state.grammar for planned in complete]
        self._where = [index for index, grammar in enumerate(grammars) if grammar is not None]
        self._masks: Future[list[Masks | InvalidRequest]] | None = None
        if self._where:
            requests = [
                planned.mask_request(grammar)
                for planned, grammar in zip(complete, grammars, strict=True)
                if grammar is not None
            ]
            self._masks = masks.start(requests)

    def replies(self, engine: ServedEngine, logits: Logits) -> list[BlockScores | Exception]:
        """A reply for each request, after the pass; DeadEnd if it must run with fewer drafts."""
        found: dict[int, Masks | InvalidRequest] = {}
        if self._masks is not None:
            found = dict(zip(self._where, self._masks.result(), strict=True))
        asks = [
            planned.ask(masks.forbidden if isinstance(masks := found.get(i), Masks) else None)
            for i, planned in enumerate(self._complete)
        ]
        replies = engine.score(asks, logits)
        for index, masks in found.items():
            if isinstance(masks, InvalidRequest):
                replies[index] = masks
            elif masks.num_live < len(masks.forbidden):
                replies[index] = self._dead_end(index, masks)
        return replies

    def _dead_end(self, index: int, masks: Masks) -> Exception:
        """Without allowed token after the committed output, the generation fails by name."""
        grammar = self._complete[index].live.state.grammar
        assert grammar is not None, "it has masks"
        if masks.num_live:
            return DeadEnd(masks.num_live)
        return InvalidRequest(grammar.grammar.field, masks.why)


def grammar_state(command: OpenTarget, engine: ServedEngine) -> GrammarState | None:
    """Position at the beginning of the output; None: free text. Raises the open's error."""
    if isinstance(command.grammar, Grammar):
        return GrammarState(command.grammar, engine.info.eos_token_ids)
    if command.grammar is not None:
        raise command.grammar
    return None
