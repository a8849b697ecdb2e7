"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

import json

from orchestrator.admission.api_keys import current_client
from orchestrator.generation.context import GenerationContext
from orchestrator.generation.conversation import build_turn, num_chars
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.validation import ValidRequest, check_num_token_ids, validate
from orchestrator.http.bodies import DetokenizeBody, TokenizeBody, TokenizeChatBody, parse_body
from orchestrator.http.calls import Call
from orchestrator.http.completions import Resources
from orchestrator.http.models import Models
from orchestrator.http.output import TokenTexts
from orchestrator.http.requests import chat_fields, prompt_request
from orchestrator.replicas.models import Limits
from orchestrator.sessions import unrecorded
from outrider.errors import InvalidRequest


class Tokens:
    """Endpoints that encode and decode. The work is done in threads."""

    def __init__(self, resources: Resources, models: Models) -> None:
        self._limits = resources.use_case.limits
        self._context: GenerationContext = resources.use_case.context
        self._models = models
        self._texts = TokenTexts(self._context.tokenizer)

    async def tokenize(self, call: Call) -> None:
        """Encodes a prompt, or renders and encodes a chat, exactly as a request would."""
        content, limits = await call.body(), self._limits()
        context, client = self._context, current_client()
        request, has_texts = await context.encoding.check(lambda: self._parsed(content, limits))
        record = unrecorded("tokenize", "").record

        def encode() -> list[int]:
            turn = build_turn(request, record, context.tokenizer, limits.max_context_len)
            return turn.token_ids

        token_ids = await context.encoding.run(encode, num_chars(request, record))
        client.quota.spend(len(token_ids))
        texts = [self._texts.text(token_id) for token_id in token_ids] if has_texts else None
        await call.answer(
            {
                "count": len(token_ids),
                "max_model_len": limits.max_context_len,
                "tokens": token_ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, call: Call) -> None:
        """Decodes token ids to text, without special tokens."""
        content, limits = await call.body(), self._limits()
        context = self._context
        if context.tokenizer is None:
            raise InvalidRequest("tokens", "the model has no tokenizer")
        tokenizer = context.tokenizer

        def decode() -> str:
            body = parse_body(DetokenizeBody, content)
            self._models.checked(body.model)
            check_num_token_ids(len(body.tokens), limits)
            bad = next((one for one in body.tokens if not 0 <= one < limits.vocab_size), None)
            if bad is not None:
                raise InvalidRequest("tokens", f"{bad} is not in [0, {limits.vocab_size})")
            return tokenizer.decode(body.tokens)

        await call.answer({"prompt": await context.encoding.check(decode)})

    def _parsed(self, content: bytes, limits: Limits) -> tuple[ValidRequest, bool]:
        """The request, and whether it asks for the tokens' texts."""
        body: TokenizeBody | TokenizeChatBody
        request: GenerationRequest
        if _is_chat(content):
            body = parse_body(TokenizeChatBody, content)
            request = prompt_request(limits, **chat_fields(body))
        else:
            body = parse_body(TokenizeBody, content)
            request = prompt_request(
                limits, text=body.prompt, add_special_tokens=body.add_special_tokens
            )
        self._models.checked(body.model)
        return validate(request, limits, self._context.tokenizer), bool(body.return_token_strs)


def _is_chat(content: bytes) -> bool:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and "messages" in body
