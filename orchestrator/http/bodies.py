"""Bodies of requests: the fields of each endpoint and their types.

Names and meanings are OpenAI's, then vLLM's; the fields of `_Speculation` are those of `Generate`.
A field that is not listed here is refused by name; null means unset. Ranges are checked by
`orchestrator.generation.validation`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from outrider.errors import InvalidRequest

Body = TypeVar("Body", bound="_Body")


class _FirstError(FailFast):
    """Reports the first wrong entry of a list instead of one error for each of them."""

    __hash__ = object.__hash__  # Python 3.11 needs it for the union of types


Ids = Annotated[list[int], _FirstError()]

_UNKNOWN = "not a field of this endpoint; it is refused because it would have no effect"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream contains besides the output."""

    include_usage: bool | None = None


class Sampling(_Body):
    """Sampling parameters of both endpoints by the names of `SamplingParams`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Annotated[list[str], _FirstError()] | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], Field(max_length=1 << 16)] | None = None
    allowed_token_ids: Ids | None = None


class Speculation(_Body):
    """Fields of `Generate` that OpenAI's endpoints do not have."""

    gamma: int | None = None
    verification: Literal["rejection", "coupled", "block"] | None = None
    draft_source: Literal["auto", "model", "lookup", "none"] | None = None
    draft_wait: Literal["adaptive", "always"] | None = None
    lookahead: int | None = None
    fan_out: int | None = None
    durability: Literal["durable", "fast"] | None = None
    session_id: str | None = None
    create_session: bool | None = None
    priority: int | None = None


class CompletionBody(Sampling, Speculation):
    """Body of `/v1/completions`."""

    prompt: Any = None
    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


class TextPart(_Body):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """Message of a chat."""

    role: str
    content: str | Annotated[list[TextPart], _FirstError()] | None = None


class ChatBody(Sampling, Speculation):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], _FirstError()]
    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


class TokenizeBody(_Body):
    """Body of `/tokenize`: a prompt or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], _FirstError()] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(_Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Ids


def parse_body(kind: type[Body], content: bytes) -> Body:
    """The body, checked for names and types. Raises InvalidRequest naming the first wrong field."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidRequest("body", f"is not JSON: {first['msg']}") from None
        field = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(".".join(map(str, first["loc"])), _UNKNOWN) from None
        why = first["msg"].replace("Input should be", "must be")
        raise InvalidRequest(field, why.replace("Field required", "is required")) from None


def _path(places: tuple[int | str, ...]) -> str:
    """Path of a field, without pydantic's names of the types in a union; `body` for all of it."""
    *outer, last = places or ("body",)
    path = [place for place in outer if isinstance(place, int) or place in _NAMES]
    if isinstance(last, int) or last in _NAMES or not path:
        path.append(last)
    return ".".join(map(str, path))


_NAMES = frozenset(
    name
    for kind in (CompletionBody, ChatBody, Message, TextPart, StreamOptions)
    for name in kind.model_fields
)
