"""Bodies of requests: the fields of each endpoint and their types.

Names and meanings are OpenAI's, then vLLM's, then those of `Generate`.
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
Texts = Annotated[list[str], _FirstError()]

_UNKNOWN = "not a field of this endpoint; it is refused because it would have no effect"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream contains besides the output."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(_Body):
    """Sampling parameters of both endpoints by the names of `SamplingParams`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | Texts | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Texts | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None


class Format(_Body):
    """vLLM's `structured_outputs`: the format of the output; exactly one field."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    structural_tag: str | None = None


class JsonSchema(_Body):
    """Schema of OpenAI's `response_format`; an output always keeps it, `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """OpenAI's `response_format`, and vLLM's type `structural_tag` in both forms."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: Texts | None = None


class Generating(Sampling):
    """Fields of both endpoints besides the prompt and log-probabilities.

    Those from `user` on have no effect: they are labels, or have the only value that we serve.
    """

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: Format | None = None
    response_format: ResponseFormat | None = None
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
    token_details: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


class CompletionBody(Generating):
    """Body of `/v1/completions`."""

    prompt: Any = None
    add_special_tokens: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None


class TextPart(_Body):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


class Function(_Body):
    """Function of a tool call."""

    name: str
    arguments: str


class ToolCall(_Body):
    """Call of a tool in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(_Body):
    """Message of a chat."""

    role: str
    content: str | Annotated[list[TextPart], _FirstError()] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], _FirstError()] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None


class Chat(_Body):
    """Messages and how they are rendered."""

    messages: Annotated[list[Message], _FirstError()]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatBody(Chat, Generating):
    """Body of `/v1/chat/completions`."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


class TokenizeBody(_Body):
    """Body of `/tokenize`, for a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(Chat):
    """Body of `/tokenize`, for a chat."""

    model: str | None = None
    return_token_strs: bool | None = None


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
    for kind in (
        CompletionBody,
        ChatBody,
        Message,
        TextPart,
        ToolCall,
        Function,
        StreamOptions,
        Format,
        ResponseFormat,
        JsonSchema,
        TokenizeBody,
        DetokenizeBody,
    )
    for name in (*kind.model_fields, *(f.alias for f in kind.model_fields.values() if f.alias))
)
