"""Tokenizer of a model: encodes and decodes text, renders chats, has a fingerprint.

`outrider.tokenizer_files` finds and reads the files, `outrider.detokenizer` decodes streams.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from outrider.chat_template import ChatTemplate
from outrider.detokenizer import Detokenizer, TokenBytes, WindowDetokenizer
from outrider.errors import ConfigError, InvalidRequest
from outrider.tokenizer_files import TokenizerFiles
from outrider.vocabulary import Vocabulary


class Tokenizer:
    """Tokenizer; immutable after loading. Encode in a thread: a long text takes milliseconds."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """`special_tokens`: texts of special tokens by name, such as `eos_token`."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._token_bytes: TokenBytes | None
        self._special_tokens = dict(special_tokens)
        self.fingerprint = _fingerprint(backend)
        added = backend.get_added_tokens_decoder()
        self._special_texts = {i: token.content for i, token in added.items() if token.special}
        self._special_ids = {content: i for i, content in self._special_texts.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = (
            re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        )
        # With special tokens' own bytes, for texts that keep them.
        self._all_bytes: TokenBytes | None = None
        try:
            self._token_bytes = TokenBytes(backend, frozenset(self._special_texts))
            self._all_bytes = TokenBytes(backend, frozenset())
        except NotImplementedError:
            self._token_bytes = None
        self._chat_template = chat_template

    @classmethod
    def load(cls, model: str, chat_template: str | None = None) -> Tokenizer | None:
        """Loads it from a local directory or Hub name; None if the model has no tokenizer.

        `chat_template`: a file to use instead of the model's chat template. Raises ConfigError for
        broken or unavailable files.
        """
        files = TokenizerFiles(model)
        try:
            backend = files.backend()
            if backend is None:
                return None
            settings = files.settings()
            special_tokens = files.special_tokens(settings)
            templates = files.chat_templates(settings)
            if chat_template is not None:
                templates = {"default": _read_template(chat_template)}
            template = None
            if "default" in templates:
                tool_use = templates.get("tool_use")
                template = ChatTemplate(templates["default"], special_tokens, tool_use)
            return cls(backend, special_tokens, template)
        except ConfigError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ConfigError(f"the tokenizer of {model} cannot be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def max_token_id(self) -> int:
        """Greatest id of a token."""
        return max(self._backend.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Token hashes to compare with another model's. The first use takes about 0.1 s."""
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        return Vocabulary.of(self._backend.get_vocab(with_added_tokens=True), added)

    @functools.cached_property
    def max_token_chars(self) -> int:
        """Length of the longest token that is not special, in characters."""
        special = set(self._special_ids)
        tokens = self._backend.get_vocab(with_added_tokens=True)
        return max((len(token) for token in tokens if token not in special), default=1)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, keep_last: int | None = None
    ) -> list[int]:
        """Token ids of the text.

        `keep_last`: maximum number of tokens; those at the start of the text are dropped, special
        tokens that are added are not, as transformers' truncation on the left.
        """
        # Unlike `encode`, this releases the GIL and computes no offsets.
        adds_now = add_special_tokens and keep_last is None
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=adds_now)
        if keep_last is None:
            return list(encoded.ids)
        num_added = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoded.truncate(max(0, keep_last - num_added), direction="left")
        if add_special_tokens:
            encoded = self._backend.post_process(encoded)
        return list(encoded.ids)[-keep_last:]

    def detokenizer(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """Detokenizer of an output after this prompt; for one task or thread at a time."""
        token_bytes = self._token_bytes if skip_special_tokens else self._all_bytes
        if token_bytes is not None:
            return token_bytes.detokenizer(prompt_ids)
        decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
        has_text = functools.partial(self._has_text, skip_special_tokens=skip_special_tokens)
        return WindowDetokenizer(decode, has_text, prompt_ids)

    def _has_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        if skip_special_tokens and token_id in self._special_texts:
            return False
        return self._backend.id_to_token(token_id) is not None

    @property
    def token_bytes(self) -> TokenBytes | None:
        """Bytes of each token; None if the decoder does not map tokens to bytes."""
        return self._token_bytes

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the special tokens by their text."""
        return self._special_ids

    def special_token(self, name: str) -> str:
        """Text of a named special token such as `eos_token`; empty if there is none."""
        return self._special_tokens.get(name, "")

    def special_text(self, token_id: int) -> str | None:
        """Text of a special token, which `decode` leaves out; None for other tokens."""
        return self._special_texts.get(token_id)

    @property
    def tokens(self) -> frozenset[str]:
        """All entries of the vocabulary, added tokens included."""
        return frozenset(self._backend.get_vocab(with_added_tokens=True))

    def token(self, token_id: int) -> str | None:
        """Entry of the vocabulary, as its file has it; None: no token has this id."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def split_at_special_tokens(self, text: str) -> list[str | int]:
        """The text's characters, with each special token's text replaced by its id."""
        if self._special_pattern is None:
            return list(text)
        parts: list[str | int] = []
        for index, part in enumerate(self._special_pattern.split(text)):
            if index % 2:
                parts.append(self._special_ids[part])
            else:
                parts += part
        return parts

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens, without unknown ids."""
        ids = list(token_ids)
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's end-of-sequence token; None if it has none."""
        text = self._special_tokens.get("eos_token")
        return None if text is None else self._backend.token_to_id(text)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text of the messages; `options` are those of `ChatTemplate.render`.

        Encode it without adding special tokens. Raises InvalidRequest if there is no chat template
        or it rejects the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest("chat", "the model's tokenizer has no chat template; send text")
        return self._chat_template.render(messages, **options)


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error}") from error


def _fingerprint(backend: tokenizers.Tokenizer) -> str:
    """SHA-256 of the sorted vocabulary with its ids."""
    vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
