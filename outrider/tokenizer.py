"""A model's tokenizer: text to ids and back, chat template, fingerprint. Imports no torch.

Reads the files a Hugging Face model ships (`tokenizer.json`, `tokenizer_config.json`,
`chat_template.jinja`) with the `tokenizers` library. Knows nothing of streaming.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import tokenizers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outrider.detokenizer import Detokenizer, TokenBytes, WindowDetokenizer
from outrider.errors import ConfigError, InvalidRequest


class Tokenizer:
    """Immutable after loading. Encoding a long text takes milliseconds: call it in a thread."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._token_bytes: TokenBytes | None
        self._settings = settings
        self.fingerprint = _fingerprint(backend)
        added = backend.get_added_tokens_decoder()
        self._special_texts = {i: token.content for i, token in added.items() if token.special}
        self._special_ids = {content: i for i, content in self._special_texts.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = (
            re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        )
        try:
            self._token_bytes = TokenBytes(backend, frozenset(self._special_texts))
        except NotImplementedError:
            self._token_bytes = None
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        self._chat_template = _compile(template) if template else None

    @classmethod
    def load(cls, model: str) -> Tokenizer | None:
        """From a directory or hub name; None where the model has no tokenizer.

        Raises ConfigError if the files are broken or cannot be had.
        """
        main_file = _find(model, "tokenizer.json")
        if main_file is None:
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(main_file))
            config_file = _find(model, "tokenizer_config.json")
            settings = json.loads(config_file.read_text("utf-8")) if config_file else {}
            if not isinstance(settings, dict):
                raise ConfigError(f"{config_file} holds no JSON object")
            if template_file := _find(model, "chat_template.jinja"):
                settings["chat_template"] = template_file.read_text("utf-8")
            return cls(backend, settings)
        except ConfigError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ConfigError(f"the tokenizer of {model} cannot be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def max_token_chars(self) -> int:
        """Length of the longest token, special ones left out."""
        special = set(self._special_ids)
        tokens = self._backend.get_vocab(with_added_tokens=True)
        return max((len(token) for token in tokens if token not in special), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # Unlike `encode`, it does not hold the GIL, nor make the offsets.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoded.ids)

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """For an output after this prompt. Used by one task or thread at a time."""
        if self._token_bytes is not None:
            return self._token_bytes.detokenizer(prompt_ids)
        return WindowDetokenizer(self.decode, self._has_text, prompt_ids)

    def _has_text(self, token_id: int) -> bool:
        if token_id in self._special_texts:
            return False
        return self._backend.id_to_token(token_id) is not None

    def special_text(self, token_id: int) -> str | None:
        """The text of a special token, which is not part of a decoded text; None for others."""
        return self._special_texts.get(token_id)

    def split_at_special_tokens(self, text: str) -> list[str | int]:
        """The text's characters, and the id in the place of each special token's text."""
        if self._special_pattern is None:
            return list(text)
        parts: list[str | int] = []
        for index, part in enumerate(self._special_pattern.split(text)):
            if index % 2:
                parts.append(self._special_ids[part])
            else:
                parts += part
        return parts

    def decode(self, token_ids: Sequence[int]) -> str:
        """Special tokens are left out; ids that the tokenizer does not know give nothing."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation with the prompt for the next answer; to encode without special tokens.

        Raises InvalidRequest if the tokenizer has no chat template or it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest("chat", "the model's tokenizer has no chat template; send text")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {
            name: _token_text(self._settings[name]) for name in names if self._settings.get(name)
        }
        try:
            return self._chat_template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **special,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest("chat", f"the chat template refuses it: {error}") from error


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _fingerprint(backend: tokenizers.Tokenizer) -> str:
    vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for training; here it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """As Hugging Face renders them, so that the same templates work."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template cannot be read: {error}") from error


def _find(model: str, name: str) -> Path | None:
    directory = Path(model).expanduser()
    if directory.is_dir():
        path = directory / name
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(model, name))
    except LocalEntryNotFoundError as error:
        raise ConfigError(f"{model} is no directory, and no model hub can be reached") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 404:
            return None
        raise ConfigError(f"{name} of {model} cannot be had: {error}") from error
    except huggingface_hub.errors.HFValidationError as error:
        raise ConfigError(f"{model} is neither a directory nor a hub name") from error
